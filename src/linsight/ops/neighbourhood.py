"""Softmax attention of each token to the window around it, by gathering its keys: O(N K^2 d) for K x K windows.

A window is the product of one on each axis, of a side of L tokens, with kernel K, dilation D and stride S:

    group     g = x mod D, in which token x has place c = floor(x / D) of n = ceil((L - g) / D)
    leader    l = min(floor(c / S) S + floor(S / 2), n - 1), whose window all tokens of its block share
    window    the K places from clamp(l - floor(K / 2), 0, n - K) on: at the rim it moves inward, and is never cut
    causal    l = min(floor(c / S) S + S - 1, n - 1), and the places above l - K, up to c

as Hassani et al. have it: "Neighborhood Attention Transformer", CVPR 2023 (arXiv 2204.07143), "Dilated Neighborhood
Attention Transformer" (arXiv 2209.15001), "Generalized Neighborhood Attention" (arXiv 2504.16922; stride and even K).
They refuse sides below K D. Here D becomes max(1, floor(L / K)) there, and a side shorter than K is seen whole.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linsight.errors import LinsightError

from .dispatch import fused_form
from .layout import Tile
from .sizes import divided, traced, unflatten
from .states import accumulator, full_precision

_KEYS = 25  # keys of a query that are gathered at once
_AT_ONCE = 2**22  # numbers gathered at once where no gradients are recorded


class AxisWindow(NamedTuple):
    """Which keys along one axis a query sees. 1 <= stride <= kernel."""

    kernel: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False


class _Side(NamedTuple):
    """The keys of every place along one axis, `(B or 1, places, K)` each.

    index: where the key is.  offset: key minus query, in units of the dilation.  inside: whether there is one.
    """

    index: Tensor  # type: ignore[assignment]  # also a method of tuples
    offset: Tensor
    inside: Tensor

    def at(self, places: Tensor) -> "_Side":
        """The rows of `places`."""
        return _Side(*(table.index_select(1, places) for table in self))


def neighbourhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    window: int | tuple[AxisWindow, AxisWindow],
    table: Tensor | None = None,
) -> Tensor:
    """softmax(q.k / sqrt(D) + bias) v over windows, for the own grid tokens of `tile`: `(B, n, H, E)`.

    `q`, `k` `(B, n, H, D)`, `v` `(B, n, H, E)`, finite, are all grid tokens that `tile` sees, and its halo has to cover
    the windows: `K - 1` tokens where stride and dilation are 1. In a padded batch each image has a rim of its own.
    Computed in the accumulator's dtype; without gradients, so many queries at once that memory does not grow with
    what is gathered. On a CPU a whole grid is computed in blocks of queries (`ops/cpu/neighbourhood.py`); under
    `use_form("flex")` on CUDA by torch's FlexAttention, compiled for each grid, in the dtype of v.

    Args:
        window: that of rows and that of columns; a number is the kernel of both.
        table: `(H, 2K - 1, 2K' - 1)`, the bias at each distance, key minus query in units of the dilation.
    """
    windows = _both(window)
    known = type(v) is Tensor and not traced(v)  # blocks are laid out by its numbers
    if known and tile.is_whole and tile.sizes is None and v.dtype != torch.float64:
        fused = fused_form("neighbourhood_attention", q)
        if fused:
            return fused(q, k, v, (tile.grid.height, tile.grid.width), windows, table)
    axes = _sides(tile, windows, v.device)
    return _of_windows(tile.inner_grid(q), k, v, axes, (tile.height, tile.width), tile.seen, table)


def neighbourhood_attention_nd(
    q: Tensor, k: Tensor, v: Tensor, windows: Sequence[AxisWindow], table: Tensor | None = None
) -> Tensor:
    """softmax(q.k / sqrt(D) + bias) v over windows of a grid of any number of axes, as of videos and volumes.

    `q`, `k` `(B, *sides, H, D)`, `v` `(B, *sides, H, E)`, finite -> `(B, *sides, H, E)`; the rest as of
    `neighbourhood_attention`.

    Args:
        windows: that of each axis.
        table: `(H, 2K - 1, 2K' - 1, ...)`, the bias at each distance.

    Raises:
        LinsightError: there is not a window for each axis.
    """
    sides = tuple(v.shape[1:-2])
    if len(windows) != len(sides) or not sides:
        raise LinsightError(f"tokens lie on {len(sides)} axes, but there are {len(windows)} windows: give one for each")
    lengths = (torch.full((1, 1), side, dtype=torch.long, device=v.device) for side in sides)
    axes = [
        _side(0, side, length, window, (0, side)) for side, length, window in zip(sides, lengths, windows, strict=True)
    ]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    return unflatten(_of_windows(q, k, v, axes, sides, sides, table), 1, sides)


def neighbourhood_mean(
    scores: Tensor, v: Tensor, tile: Tile, window: int | tuple[AxisWindow, AxisWindow], table: Tensor | None = None
) -> Tensor:
    """softmax(scores + bias) v over windows, with scores that are given: otherwise as `neighbourhood_attention`.

    scores: `(B, n, H, K * K')`, for the keys of each window row by row.
    """
    dtype, axes = accumulator(v.dtype), _sides(tile, _both(window), v.device)
    with full_precision(v):
        scores, v = (x.to(dtype).transpose(1, 2) for x in (scores, v))  # (B, H, n, ...)
        bias = None if table is None else table.to(dtype)
        parts = []
        for some, sides in _cut(scores, v.shape[-1], axes, (tile.height, tile.width)):
            places = _places(sides, tile.seen, v)
            parts.append(_mean(scores.index_select(2, some), v.flatten(0, 2), places, sides, bias))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2)


def axis_window(place: Tensor, length: Tensor, window: AxisWindow) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of each place of a side, as this module defines them.

    `place` `(n,)`, `length` `(B or 1, 1)`, integers. Returns keys, their distance to the query in units of the
    dilation, and whether they are seen, `(B or 1, n, K)` each; what is not seen may lie outside.
    """
    kernel, dilation, stride, causal = window
    step = (length // kernel).clamp(1, dilation)
    group, place = place % step, place // step
    count = (length - group + step - 1) // step
    block = place // stride * stride
    steps = torch.arange(kernel, device=place.device)
    if causal:
        leader = torch.minimum(block + stride - 1, count - 1)
        keys = (leader - kernel + 1)[..., None] + steps
        seen = (keys >= 0) & (keys <= place[..., None])
    else:
        leader = torch.minimum(block + stride // 2, count - 1)
        keys = torch.minimum(leader - kernel // 2, count - kernel).clamp(min=0)[..., None] + steps
        seen = keys < count[..., None]
    return keys * step[..., None] + group[..., None], keys - place[..., None], seen


def _both(window: int | tuple[AxisWindow, AxisWindow]) -> tuple[AxisWindow, AxisWindow]:
    return (AxisWindow(window), AxisWindow(window)) if isinstance(window, int) else window


def _sides(tile: Tile, windows: tuple[AxisWindow, AxisWindow], device: torch.device) -> tuple[_Side, _Side]:
    """The keys of the rows and of the columns of `tile`."""
    down, across = windows
    lengths = (
        [torch.full((1, 1), side, dtype=torch.long, device=device) for side in tile.grid[:2]]
        if tile.sizes is None
        else tile.sizes.to(device)[:, :, None].unbind(1)
    )
    rows = _side(tile.top, tile.height, lengths[0], down, tile.rows)
    return rows, _side(tile.left, tile.width, lengths[1], across, tile.columns)


def _count(axes: Sequence[_Side]) -> int:
    """The keys of a query."""
    return math.prod([int(axis.index.shape[-1]) for axis in axes])


def _side(start: int, count: int, length: Tensor, window: AxisWindow, seen: tuple[int, int]) -> _Side:
    """The keys of `count` places from `start` on, by their place in what is `seen`."""
    index, offset, inside = axis_window(torch.arange(count, device=length.device) + start, length, window)
    most = window.kernel - 1  # padding is further away, and reads anything
    index = (index - seen[0]).clamp(min=0).clamp(max=seen[1] - seen[0] - 1)
    return _Side(index, offset.clamp(-most, most) + most, inside)


def _cut(q: Tensor, width: int, axes: Sequence[_Side], own: Sequence[int]) -> Iterator[tuple[Tensor, Sequence[_Side]]]:
    """The places of the queries `(B, H, n, D)`, in so many parts that each gathers little; one if it is recorded.

    With the keys of each part, on each axis.  width: the numbers of one key.  own: the sides that queries lie on.
    """
    places: Sequence[Tensor] = (torch.arange(q.shape[2], device=q.device),)
    if not (torch.is_grad_enabled() or traced()):
        each = q.shape[0] * q.shape[1] * min(_count(axes), _KEYS) * width
        places = places[0].split(max(1, _AT_ONCE // max(1, each)))
    for some in places:
        on_axes = [some]
        for side in reversed(own[1:]):
            on_axes[:1] = divided(on_axes[0], side)
        yield some, [axis.at(place) for axis, place in zip(axes, on_axes, strict=True)]


def _of_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Sequence[_Side],
    own: Sequence[int],
    seen: Sequence[int],
    table: Tensor | None,
) -> Tensor:
    """Outputs `(B, n, H, E)` of queries `(B, n, H, D)` that lie on sides `own`, whose keys lie on those `seen`."""
    dtype = accumulator(v.dtype)
    with full_precision(v):
        q = q.to(dtype) * q.shape[-1] ** -0.5
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # (B, H, n, D)
        bias = None if table is None else table.to(dtype)
        parts = []
        for some, sides in _cut(q, max(q.shape[-1], v.shape[-1]), axes, own):
            parts.append(_attend(q.index_select(2, some), k, v, sides, seen, bias))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, axes: Sequence[_Side], seen: Sequence[int], table: Tensor | None
) -> Tensor:
    """Outputs `(B, H, n, E)` of queries `(B, H, n, D)`."""
    places, k, v = _places(axes, seen, k), k.flatten(0, 2), v.flatten(0, 2)
    scores = torch.cat([(_gather(k, p) @ q[..., None])[..., 0] for p in places], dim=-1)
    return _mean(scores, v, places, axes, table)


def _places(axes: Sequence[_Side], seen: Sequence[int], k: Tensor) -> tuple[Tensor, ...]:
    """The rows of `k` `(B, H, n, D)`, flattened, that are the keys of each query, some at once."""
    batch, heads, count, _ = k.shape
    keys = _count(axes)
    some = [min(_KEYS, keys - first) for first in range(0, keys, _KEYS)]  # told one by one, for exporters
    first = torch.arange(batch * heads, device=k.device).view(batch, heads, 1, 1) * count
    return (_joined([axis.index for axis in axes], seen)[:, None] + first).split(some, -1)


def _mean(scores: Tensor, v: Tensor, places: tuple[Tensor, ...], axes: Sequence[_Side], table: Tensor | None) -> Tensor:
    """Means of the rows of `v` at these places, `(B, H, n, E)`, by scores `(B, H, n, K)`."""
    if table is not None:
        at = _joined([axis.offset for axis in axes], table.shape[1:])
        scores = scores + unflatten(table.flatten(1).index_select(1, at.flatten()), 1, at.shape).transpose(0, 1)
    inside = functools.reduce(lambda a, b: (a[..., None] & b[..., None, :]).flatten(2), [axis.inside for axis in axes])
    scores = scores.masked_fill(~inside[:, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).split([int(p.shape[-1]) for p in places], dim=-1)
    parts = [w[..., None, :] @ _gather(v, p) for w, p in zip(weights, places, strict=True)]
    return functools.reduce(torch.add, parts)[..., 0, :]


def _joined(places: Sequence[Tensor], sides: Sequence[int]) -> Tensor:
    """Places on each axis `(B or 1, n, K)` as places `(B or 1, n, K K' ...)` in what has these sides, row by row."""
    found = places[0]
    for place, side in zip(places[1:], sides[1:], strict=True):
        found = (found[..., None] * side + place[..., None, :]).flatten(2)
    return found


def _gather(x: Tensor, places: Tensor) -> Tensor:
    """The rows `(*places, D)` of `x` `(tokens, D)`."""
    return x.index_select(0, places.flatten()).view(*places.shape, x.shape[-1])
