"""The seam between modules and their inference forms, which `linsight.fuse` has; and how a module becomes another."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import nn

from linsight.errors import LinsightError

# Class -> what makes the inference form of an instance; filled by `linsight.fuse`. For the class itself, no subclass:
# a derived one may compute something else.
INFERENCE_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


N = TypeVar("N", bound=nn.Module)


def recast(module: nn.Module, cls: type[N]) -> N:
    """A `cls` with all that `module` holds, whose class it derives from: other methods, the same parts and parameters.

    `module` itself stays what it is.
    """
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


class Fusable(nn.Module):
    """A module that timm's `reparameterize_model` and `linsight.fuse` ask for its form for inference."""

    def fuse(self) -> nn.Module:
        """The module to put in the place of this one, for inference; itself where there is none better."""
        form = INFERENCE_FORMS.get(type(self))
        return self if form is None else form(self)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse `torch.jit.script`, which asks each module of a model."""
        raise LinsightError(
            f"torch.jit.script cannot compile a {type(self).__name__}: use torch.export or torch.compile, or "
            f"torch.jit.trace where TorchScript is needed"
        )
