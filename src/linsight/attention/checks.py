"""The check at the door of every layer and block: one line for each mistake that a caller can make."""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Layout, LayoutLike, as_layout, autocasts, check_tokens

from .registry import require


def check_asked(
    owner: nn.Module | type[nn.Module],
    layout: Layout,
    *,
    keep: Tensor | None = None,
    context: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> None:
    """Raise a CapabilityError, naming who can, for what `owner` is asked and has not declared."""
    if keep is context is score_bias is layout.sizes is None and not layout.is_packed:
        return require(owner, "prefix", "prefix tokens") if layout.grid.prefix else None
    asked = (
        (keep is not None, "keep", "dropping tokens"),
        (layout.sizes is not None, "sizes", "padded batches"),
        (layout.is_packed, "packed", "packed batches"),
        (context is not None, "cross", "keys of another sequence"),
        (score_bias is not None, "score_bias", "a bias on the scores"),
        (layout.prefix > 0, "prefix", "prefix tokens"),
    )
    for present, capability, words in asked:
        if present:
            require(owner, capability, words)


def entered(x: Tensor, layout: LayoutLike | None, *, dim: int, weight: Any = None, name: str = "x") -> Layout:
    """The layout of tokens that enter a layer of `dim` channels.

    weight: one of the layer's, whose dtype and device the tokens must have, unless autocast brings them together.

    Raises:
        LinsightError: there is no layout, or the tokens do not have its number, the channels, the dtype or the device.
    """
    if layout is None:
        raise LinsightError(f"{name} came without a grid: pass Grid(height, width), with prefix= for a class token")
    found = as_layout(layout)
    if torch.compiler.is_compiling():  # a comparison would add a guard for each size
        return found
    check_tokens(x, found, name)
    if x.shape[-1] != dim:
        raise LinsightError(f"{name} has {x.shape[-1]} channels, but the layer has {dim}: {tuple(x.shape)} came")
    if not x.is_floating_point():
        raise LinsightError(f"{name} is {x.dtype}: tokens are floating-point numbers")
    if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():
        if weight.dtype != x.dtype and not autocasts(x):
            raise LinsightError(
                f"{name} is {x.dtype} and the layer {weight.dtype}: bring one to the other by .to(dtype), "
                f"or run under torch.autocast"
            )
        if weight.device != x.device:
            raise LinsightError(f"{name} is on {x.device} and the layer on {weight.device}: move one by .to(device)")
    return found


def check_beside(
    x: Tensor,
    layout: Layout,
    *,
    keep: Tensor | None = None,
    context: Tensor | None = None,
    score_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Raise a LinsightError where what comes beside the tokens `x` `(B, M, C)` does not fit them.

    `keep` `(B, N)`, `context` `(B, N, C)`, `score_bias` that broadcasts to `(B, H, M, N)`, `residual` as `x`.
    """
    if torch.compiler.is_compiling():
        return
    batch, queries = x.shape[:2]
    keys = queries if context is None else context.shape[1]
    if context is not None and context.shape[0] != batch:
        raise LinsightError(f"context has {context.shape[0]} images, but x has {batch}: one context for each")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (batch, keys)):
        raise LinsightError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}: it must be bool of shape ({batch}, {keys}), "
            f"False for tokens not to be seen"
        )
    if score_bias is not None and (
        score_bias.ndim != 4 or score_bias.shape[2:] != (queries, keys) or score_bias.shape[0] not in (1, batch)
    ):
        raise LinsightError(
            f"score_bias of shape {tuple(score_bias.shape)} is not ({batch} or 1, heads or 1, {queries}, {keys})"
        )
    if residual is not None and residual.shape != x.shape:
        raise LinsightError(f"residual of shape {tuple(residual.shape)} is not that of x, {tuple(x.shape)}")
    if layout.sizes is not None and layout.sizes.shape != (batch, 2):
        raise LinsightError(f"sizes of shape {tuple(layout.sizes.shape)}: one height and width for {batch} images")
