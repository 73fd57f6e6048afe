"""The seam between modules and their inference forms, which are told of in `linsight.fuse`."""

from collections.abc import Callable
from typing import Any

from torch import nn

# Class -> what makes the inference form of an instance; filled by `linsight.fuse`. For the class itself, no subclass:
# a derived one may compute something else.
INFERENCE_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


class Fusable(nn.Module):
    """A module that timm's `reparameterize_model` and `linsight.fuse` ask for its form for inference."""

    def fuse(self) -> nn.Module:
        """The module to put in the place of this one, for inference; itself where there is none better."""
        form = INFERENCE_FORMS.get(type(self))
        return self if form is None else form(self)
