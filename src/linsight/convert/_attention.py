"""The attentions of a model, replaced by ours."""

import warnings
from collections.abc import Callable
from typing import Any

from timm.layers import Attention
from torch import nn

from linsight.errors import LinsightError

from . import _multihead, _timm
from ._place import GridLike
from .surgery import replace, select

# Classes of attention, and what makes one of ours that answers to the same call, with the same names of weights.
_SUCCESSORS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.MultiheadAttention: _multihead.successor,
    Attention: _timm.successor,
}


def replace_attention(
    model: nn.Module,
    attention: str = "inline",
    *,
    grid: GridLike | None = None,
    prefix: int = 0,
    keep_weights: bool = True,
    where: Callable[[str], bool] | None = None,
    **options: Any,
) -> list[str]:
    """Replace every `torch.nn.MultiheadAttention`, and every `Attention` of timm's, in `model`; the names of those.

    Ours are on the same device, in the same dtype and mode. `grid` and `prefix` say where the model's tokens lie, as
    of `MultiheadAttention`: a ViT-B/16 with a class token has grid=(14, 14), prefix=1 at 224 x 224.

    Args:
        model: a model that has such attentions inside.
        keep_weights: the new projections are the old ones; parameters of the mechanism's own are always fresh.
        where: which to replace, by name; all, if None.
        options: of the mechanism.

    Raises:
        LinsightError: none is there, or one cannot be replaced. Nothing has been then.
    """
    found = select(model, tuple(_SUCCESSORS), where)
    if not found and where is not None and (there := select(model, tuple(_SUCCESSORS), None)):
        raise LinsightError(f"where= is true of none of the attentions of this model: {', '.join([*there][:4])} ...")
    if not found:
        raise LinsightError(
            f"{type(model).__name__} has no torch.nn.MultiheadAttention and no timm.layers.Attention inside to "
            f"replace: other models take a layer of create_attention"
        )

    def build(old: nn.Module, index: int) -> nn.Module:
        successor = next(make for kind, make in _SUCCESSORS.items() if isinstance(old, kind))
        return successor(old, attention, grid=grid, prefix=prefix, index=index, **options)

    report = replace(model, found, build, keep_weights=keep_weights)
    dropped = sorted({rate for old in found.values() if (rate := _dropout(old))})
    if dropped:
        warnings.warn(
            f"attention dropout ({', '.join(map(str, dropped))}) is gone: '{attention}' is given no scores to drop",
            stacklevel=2,
        )
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return list(report.replaced)


def _dropout(old: Any) -> float:
    return old.dropout if isinstance(old, nn.MultiheadAttention) else old.attn_drop.p
