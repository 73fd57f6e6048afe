"""Neighbourhood attention on a CPU: queries in blocks, each beside all keys that any of its queries sees.

A block of b places on an axis, of one dilation group, reads b + K - 1 keys, where the plain form gathers K for each
query. The few it reads in vain cost less than the gathering, as products of small matrices take the place of rows that
are picked one by one. Blocks with the same pattern (at a rim, or inside) share their mask and their biases.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..neighbourhood import AxisWindow, axis_window
from ..sizes import unflatten
from ..states import accumulator, full_precision

BLOCK = 8  # places of a block, along each axis
AT_ONCE = 2**21  # scores held at once where no gradients are recorded


class Blocks(NamedTuple):
    """The blocks of an axis that share a pattern: t of them, of b queries and w keys.

    queries, keys: where they are, `(t, b)` and `(t, w)`.  seen: which keys a query has, `(b, w)`.
    offset: key minus query in units of the dilation, from `1 - K` counted, `(b, w)`.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    offset: Tensor


class Axis(NamedTuple):
    """An axis in blocks; `home` `(side,)` is where each place is among their queries, one after the other."""

    blocks: tuple[Blocks, ...]
    home: Tensor


def neighbourhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sides: tuple[int, int],
    windows: tuple[AxisWindow, AxisWindow],
    table: Tensor | None = None,
) -> Tensor:
    """See `linsight.ops.neighbourhood_attention`, of a whole grid of the height and width `sides`."""
    axes = [axis(side, window) for side, window in zip(sides, windows, strict=True)]
    dtype = accumulator(v.dtype)
    with full_precision(v):
        q = q.to(dtype) * q.shape[-1] ** -0.5
        q, k, v = (unflatten(x.to(dtype), 1, sides) for x in (q, k, v))  # (B, height, width, H, D)
        bias = None if table is None else table.to(dtype)
        pair = q.shape[3] * math.prod(max(some.seen.numel() for some in side.blocks) for side in axes)
        each = len(q) if torch.is_grad_enabled() else max(1, AT_ONCE // pair)
        images = zip(*(x.split(max(1, each)) for x in (q, k, v)), strict=True)
        parts = [_grids(some, keys, values, axes, bias) for some, keys, values in images]
    return _joined(parts, 0).flatten(1, 2)


def _grids(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[Axis], table: Tensor | None) -> Tensor:
    """Outputs `(B, height, width, H, E)` of whole grids."""
    rows, columns = axes
    bands = [_joined([_attend(q, k, v, down, across, table) for across in columns.blocks], 2) for down in rows.blocks]
    return _joined(bands, 1).index_select(1, rows.home).index_select(2, columns.home)


def _attend(q: Tensor, k: Tensor, v: Tensor, down: Blocks, across: Blocks, table: Tensor | None) -> Tensor:
    """Outputs `(B, rows of queries, columns of queries, H, E)` of the blocks where `down` and `across` meet."""
    seen = (down.seen[:, None, :, None] & across.seen[:, None]).flatten(2).flatten(0, 1)  # (queries, keys)
    bias = q.new_zeros(seen.shape).masked_fill(~seen, -math.inf)
    if table is not None:
        found = table.index_select(1, down.offset.flatten()).index_select(2, across.offset.flatten())
        found = unflatten(unflatten(found, 2, across.offset.shape), 1, down.offset.shape)  # (H, y, m, x, n)
        bias = bias + found.transpose(2, 3).flatten(3).flatten(1, 2)
    high, wide = len(down.queries), len(across.queries)
    if not torch.is_grad_enabled():  # else all scores are kept, whatever is computed at once
        most = max(1, AT_ONCE // max(1, q.shape[0] * q.shape[3] * seen.numel()))
        high, wide = max(1, most // wide), min(wide, most)
    bands = []
    for some in _split(down, high):
        parts = [_products(q, k, v, some, other, bias) for other in _split(across, wide)]
        bands.append(_joined(parts, 2))
    return _joined(bands, 1)


def _products(q: Tensor, k: Tensor, v: Tensor, down: Blocks, across: Blocks, bias: Tensor) -> Tensor:
    """As `_attend`, all at once. bias: `(H or none, queries, keys)`."""
    mine = _cut(q, down.queries, across.queries)
    theirs, values = (_cut(x, down.keys, across.keys) for x in (k, v))
    out = torch.softmax(mine @ theirs.transpose(-1, -2) + bias, dim=-1) @ values  # (B, t, s, H, y x, E)
    out = unflatten(out, 4, (down.queries.shape[1], across.queries.shape[1]))
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)


def _split(blocks: Blocks, count: int) -> Iterator[Blocks]:
    """The blocks, so many at a time."""
    for queries, keys in zip(blocks.queries.split(count), blocks.keys.split(count), strict=True):
        yield Blocks(queries, keys, blocks.seen, blocks.offset)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _cut(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Tokens `(B, t, s, H, m n, D)` of `x` `(B, height, width, H, D)` at `rows` `(t, m)` and `columns` `(s, n)`."""
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    x = unflatten(unflatten(x, 2, columns.shape), 1, rows.shape)  # (B, t, m, s, n, H, D)
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


@functools.lru_cache(maxsize=256)
def axis(side: int, window: AxisWindow) -> Axis:
    """An axis in blocks; kept, as the next layers and images have the same."""
    # else no later call could record what it does with them, or they lay where others are made by default
    with torch.inference_mode(False), torch.device("cpu"):
        index, _, inside = (x[0] for x in axis_window(torch.arange(side), torch.tensor([[side]]), window))
        step = max(1, min(window.dilation, side // window.kernel))
        low = (index.masked_fill(~inside, side) // step).amin(dim=1)  # by place in the group, from here on
        high = (index.masked_fill(~inside, -1) // step).amax(dim=1)
        size = min(BLOCK, (side + step - 1) // step)
        first = torch.cat([torch.arange(group, side, step * size) for group in range(step)])  # of each block
        group, count = first[:, None] % step, (side - first[:, None] % step + step - 1) // step
        own = torch.minimum(first[:, None] // step + torch.arange(size), count - 1)  # the rest repeats the last
        queries = own * step + group
        low, high = low[queries], high[queries]  # (t, b)
        reach = int((high.amax(dim=1) - low.amin(dim=1)).amax()) + 1
        start = torch.minimum(low.amin(dim=1, keepdim=True), count - reach).clamp(min=0)
        there = start + torch.arange(reach)  # (t, w)
        seen = (low[..., None] <= there[:, None]) & (there[:, None] <= high[..., None])
        offset = (there[:, None] - own[..., None] + window.kernel - 1).masked_fill(~seen, 0)
        keys = torch.minimum(there, count - 1) * step + group
        patterns, which = torch.stack([seen.long(), offset], dim=-1).unique(dim=0, return_inverse=True)
        blocks = [
            Blocks(queries[which == i], keys[which == i], pattern[..., 0].bool(), pattern[..., 1])
            for i, pattern in enumerate(patterns)
        ]
        order = torch.cat([some.queries.flatten() for some in blocks])
        home = torch.empty_like(order[:side]).scatter(0, order, torch.arange(len(order)))
    return Axis(tuple(blocks), home)
