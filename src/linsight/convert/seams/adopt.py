"""A module that takes the place of another, and all that it holds."""

from torch import nn

_OWN = frozenset(vars(nn.Module()))  # what a module has before anything is put on it


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Give a fresh `module` the plain attributes, parameters, buffers, parts and mode of `source`, by their names."""
    for name, value in vars(source).items():
        if name not in _OWN:
            setattr(module, name, value)
    for name, parameter in source._parameters.items():
        module.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        module.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    for name, part in source._modules.items():
        module.add_module(name, part)
    module.training = source.training
