"""The check at the door of every layer and block: one line for each mistake that a caller can make."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Grid, Layout, LayoutLike, as_layout, autocasts, check_tokens, traced

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


def held(module: nn.Module) -> Tensor | None:
    """A parameter of the module's own, for its dtype and device; `weight` may be the work of a parametrization."""
    return next((parameter for parameter in module._parameters.values() if parameter is not None), None)


def entered(x: Tensor, layout: LayoutLike | None, *, dim: int, weight: Any = None, name: str = "x") -> Layout:
    """The layout of tokens that enter a layer of `dim` channels.

    weight: one of the layer's, whose dtype and device the tokens must have, unless autocast brings them together.

    Raises:
        LinsightError: there is no layout, or the tokens do not have its number, the channels, the dtype or the device.
    """
    if layout is None:
        raise LinsightError(f"{name} came without a grid: pass Grid(height, width), with prefix= for a class token")
    found = as_layout(layout)
    if traced():
        return found
    if not isinstance(x, Tensor):
        raise LinsightError(f"{name} is a {type(x).__name__}, not a tensor of tokens (batch, tokens, channels)")
    _check_layout(found)
    check_tokens(x, found, name)
    if x.shape[-1] != dim:
        raise LinsightError(f"{name} has {x.shape[-1]} channels, but the layer has {dim}: {tuple(x.shape)} came")
    if found.sizes is not None:
        _check_sizes(found.sizes, found.grid, x.shape[0])
    check_kind(x, weight, name)
    return found


def check_kind(x: Tensor, weight: Any, name: str = "x", owner: str = "layer") -> None:
    """Raise a LinsightError unless `x` is in floating point, and in the dtype and on the device of `weight`, if known.

    Where `weight` is of a kind of its own, quantised or sharded, who made it so answers for it.
    """
    if not x.is_floating_point():
        raise LinsightError(
            f"{name} is {x.dtype}, not floating point: bring it there by .to(dtype), of images as v / 255"
        )
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return
    if weight.dtype != x.dtype and not autocasts(x):
        raise LinsightError(
            f"{name} is {x.dtype} and the {owner} {weight.dtype}: bring one to the other by .to(dtype), "
            f"or run under torch.autocast"
        )
    if weight.device != x.device:
        raise LinsightError(f"{name} is on {x.device} and the {owner} on {weight.device}: move one by .to(device)")


def _check_layout(layout: Layout) -> None:
    for grid in layout.grids or (layout.grid,):
        if (
            not isinstance(grid, Grid)
            or not all(type(side) is int or isinstance(side, Integral | torch.SymInt) for side in grid)
            or 0 in grid[:2]
        ):
            raise LinsightError(f"a layout of {grid!r:.60}: pass a Grid(height, width) of at least one token")


def _check_sizes(sizes: Any, grid: Grid, batch: int) -> None:
    if not isinstance(sizes, Tensor) or sizes.shape != (batch, 2) or sizes.is_floating_point():
        said = f"{sizes.dtype} of shape {tuple(sizes.shape)}" if isinstance(sizes, Tensor) else type(sizes).__name__
        raise LinsightError(f"sizes are {said}: give the height and width of each image, integers ({batch}, 2)")
    if sizes.device.type != "cpu" or not batch:  # to read them would be to wait for the device
        return
    low, high = sizes.amin(dim=0).tolist(), sizes.amax(dim=0).tolist()
    if min(low) < 1 or high[0] > grid.height or high[1] > grid.width:
        raise LinsightError(f"sizes of {low} to {high} tokens do not fit a canvas of {grid.height}x{grid.width}")


def check_beside(
    x: Tensor,
    layout: Layout,
    *,
    keep: Tensor | None = None,
    context: Tensor | None = None,
    score_bias: Tensor | None = None,
    residual: Tensor | None = None,
    heads: int | None = None,
) -> None:
    """Raise a LinsightError where what comes beside the tokens `x` `(B, M, C)` does not fit them.

    `keep` `(B, N)`, `context` `(B, N, C)`, `score_bias` that broadcasts to `(B, heads, M, N)`, `residual` as `x`.
    """
    if traced() or keep is context is score_bias is residual is None:
        return
    batch, queries = x.shape[:2]
    for name, given in (("keep", keep), ("context", context), ("score_bias", score_bias), ("residual", residual)):
        if given is not None and (not isinstance(given, Tensor) or given.device != x.device):
            where = given.device if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise LinsightError(f"{name} is {where}, but x is on {x.device}: pass a tensor on the same device")
    if context is not None and (context.ndim != 3 or context.shape[0] != batch):
        raise LinsightError(f"context has shape {tuple(context.shape)}: give one (tokens, channels) for {batch} images")
    keys = queries if context is None else context.shape[1]
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (batch, keys)):
        raise LinsightError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}: it must be bool of shape ({batch}, {keys}), "
            f"False for tokens not to be seen"
        )
    if score_bias is not None:
        _check_bias(score_bias, x.dtype, (batch, heads, queries, keys))
    if residual is not None and (residual.shape != x.shape or not residual.is_floating_point()):
        raise LinsightError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)}: it must be as x, {tuple(x.shape)}"
        )


def _check_bias(bias: Tensor, dtype: torch.dtype, wanted: tuple[int, int | None, int, int]) -> None:
    batch, heads, queries, keys = wanted
    sides = zip(reversed(bias.shape), reversed(wanted), strict=False)
    if bias.ndim > 4 or any(own not in (1, side) for own, side in sides if side is not None):
        raise LinsightError(
            f"score_bias of shape {tuple(bias.shape)} is not ({batch} or 1, {heads or 'heads'} or 1, {queries}, {keys})"
        )
    if bias.dtype not in (torch.bool, torch.float32, dtype):
        raise LinsightError(f"score_bias is {bias.dtype}: it must be {dtype}, as x, or bool")
