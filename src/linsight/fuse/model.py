"""`fuse`: a model for inference."""

import copy
from typing import TypeVar

from torch import nn

from linsight.attention import INFERENCE_FORMS
from linsight.errors import LinsightError

from .blocks import BLOCK_FORMS
from .convs import CONV_FORMS
from .form import Inference, inner_fused, mark, unless_watched
from .inline import LAYER_FORMS
from .tables import TABLE_FORMS

M = TypeVar("M", bound=nn.Module)

for _kind, _form in {**BLOCK_FORMS, **CONV_FORMS, **LAYER_FORMS, **TABLE_FORMS}.items():
    INFERENCE_FORMS[_kind] = unless_watched(_form)


def fuse(model: M, inplace: bool = False) -> M:
    """A model for inference, in which layers were replaced by quicker forms: equal to `model`, to rounding.

    Convolution and batch norm become one; MLPs and residual sums write in place; InLine's projections are folded into
    its covariance; biases of agent attention are kept. timm's `reparameterize_model` reaches the same forms. Published
    weights are loaded before fusing, and exported before it; to train a fused model is refused.

    Args:
        model: a model or a layer, whose weights are final. Where it has hooks, it stays plain.
        inplace: change `model` itself, instead of a copy.

    Raises:
        LinsightError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise LinsightError(f"fuse takes a model or a layer, a torch.nn.Module: a {type(model).__name__} came")
    final = (model if inplace else copy.deepcopy(model)).eval().requires_grad_(False)
    found = fused(final)
    if found is not final and type(final) not in INFERENCE_FORMS:
        final.__dict__["_modules"] = found._modules
        found = final
    mark(found)
    return found


def fused(model: M) -> M:
    """The forms of a model in evaluation mode, for the moment: they share its weights, and `model` stays as it is."""
    return inner_fused(model)  # type: ignore[return-value]


def is_fused(model: nn.Module) -> bool:
    """True where a part of `model` is a form for inference."""
    return any(isinstance(module, Inference) for module in model.modules())
