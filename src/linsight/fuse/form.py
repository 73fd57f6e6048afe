"""Inference forms: they refuse to train, and what is inside them is fused, too."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from linsight.attention import INFERENCE_FORMS, recast
from linsight.errors import LinsightError

N = TypeVar("N", bound=nn.Module)
Form = Callable[[Any], nn.Module]


def inner_fused(module: nn.Module) -> nn.Module:
    """The form of `module`, or a copy of it around the forms of its parts; itself where there are none."""
    form = INFERENCE_FORMS.get(type(module))
    return parts_fused(module) if form is None else form(module)


def parts_fused(module: nn.Module) -> nn.Module:
    """A copy of `module` around the forms of its parts; itself where there are none."""
    parts = {name: part and inner_fused(part) for name, part in module._modules.items()}
    if all(part is module._modules[name] for name, part in parts.items()):
        return module
    twin = recast(module, type(module))
    twin._modules.update(parts)
    return twin


def watched(*modules: nn.Module) -> bool:
    """True where a hook, or a `forward` put in the place of the class's, sees what goes in or comes out."""
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)


def unless_watched(form: Form) -> Form:
    """A `form` that leaves plain what somebody watches inside, so that nothing seen is left out or written over."""
    return lambda module: parts_fused(module) if watched(*module.modules()) else form(module)


def form_of(module: nn.Module, cls: type[N], **changes: Any) -> N:
    """A `cls` with the parameters of `module` and the forms of its parts, in evaluation mode.

    changes: attributes, methods too, that only this one has.
    """
    twin = recast(module, cls)
    twin._modules.update({name: part and inner_fused(part) for name, part in module._modules.items()})
    twin.training = False
    for name, value in changes.items():
        object.__setattr__(twin, name, value)
    mark(twin)
    return twin


class Inference(nn.Module):
    """A part of a form that refuses to train, and does nothing else."""

    def train(self, mode: bool = True) -> "Inference":
        """Raise a LinsightError where it is asked to train."""
        if mode:
            raise LinsightError("this model is fused, a form for inference: train the one that it was made of")
        return self


def mark(module: nn.Module) -> None:
    """Let `module` refuse to train; a container's parts do it themselves."""
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        module._modules["inference"] = Inference()
