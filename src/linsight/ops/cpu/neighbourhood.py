"""Neighbourhood attention on a CPU: queries in blocks, each beside all keys that any of its queries sees.

A block of b places on an axis, of one dilation group, reads b + K - 1 keys, where the plain form gathers K for each
query. The few it reads in vain cost less than the gathering, as products of small matrices take the place of rows that
are picked one by one. Blocks with the same pattern (at a rim, or inside) share their mask and their biases; a grid of a
few blocks is computed at once instead, by a mask of each.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..neighbourhood import AxisWindow, axis_window
from ..sizes import unflatten
from ..states import accumulator, full_precision

BLOCK = 8  # places of a block, along each axis
AT_ONCE = 2**21  # scores computed at once where no gradients are recorded
FEW = 64  # blocks of a grid that are computed at once, whatever their patterns


class Blocks(NamedTuple):
    """Blocks of an axis: t of them, of b queries and w keys.

    queries, keys: where they are, `(t, b)` and `(t, w)`.  hidden: added to scores, -inf where a query does not see a
    key, else 0, `(t, b, w)`, or `(1, b, w)` where all have the same.  offset: key minus query in units of the dilation,
    from `1 - K` counted, shaped as `hidden`.
    """

    queries: Tensor
    keys: Tensor
    hidden: Tensor
    offset: Tensor


class Axis(NamedTuple):
    """An axis in blocks, of so many places: those that share a pattern together, and all together."""

    side: int
    blocks: tuple[Blocks, ...]
    whole: Blocks


def neighbourhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sides: tuple[int, int],
    windows: tuple[AxisWindow, AxisWindow],
    table: Tensor | None = None,
) -> Tensor:
    """See `linsight.ops.neighbourhood_attention`, of a whole grid of the height and width `sides`.

    torch has no second derivatives of what it calls here: the plain form has them, `use_form("plain")`.
    """
    rows, columns = (axis(side, window) for side, window in zip(sides, windows, strict=True))
    dtype = accumulator(v.dtype)
    with full_precision(v):
        q = q.to(dtype) * q.shape[-1] ** -0.5
        bias = None if table is None else table.to(dtype)
        pair = q.shape[2] * rows.whole.hidden[0].numel() * columns.whole.hidden[0].numel()
        each = len(q) if torch.is_grad_enabled() else AT_ONCE // pair
        images = zip(*(x.to(dtype).split(max(1, each)) for x in (q, k, v)), strict=True)
        parts = [_grids((rows, columns), bias, *(x.transpose(0, 1).contiguous() for x in some)) for some in images]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(0, 1)


def _grids(axes: tuple[Axis, Axis], table: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outputs `(N, B, H, E)` of q, k and v `(N, B, H, D)`."""
    rows, columns = axes
    masks = rows.whole.hidden.numel() * columns.whole.hidden.numel()
    few = table is None and len(rows.whole.queries) * len(columns.whole.queries) <= FEW and masks <= AT_ONCE
    downs, acrosses = ((side.whole,) if few else side.blocks for side in axes)
    found = [
        part for down in downs for across in acrosses for part in _attend(q, k, v, down, across, columns.side, table)
    ]
    outs, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    home = torch.empty_like(places[: len(q)]).scatter(0, places, torch.arange(len(places), device=places.device))
    return outs.index_select(0, home)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, down: Blocks, across: Blocks, width: int, table: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs `(n, B, H, E)` of the blocks where `down` and `across` meet, and the places `(n,)` of their queries."""
    hidden = down.hidden[:, None, :, None, :, None] + across.hidden[:, None, :, None]  # (t, s, y, x, m, n)
    bias = hidden.to(q.dtype).flatten(4).flatten(2, 3)[:, :, None]  # (t, s, 1, queries, keys)
    if table is not None:
        found = table.index_select(1, down.offset.flatten()).index_select(2, across.offset.flatten())
        found = unflatten(unflatten(found, 2, across.offset.shape[1:]), 1, down.offset.shape[1:])  # (H, y, m, x, n)
        # images stand beside heads, and the table is of a head
        bias = bias + found.transpose(2, 3).flatten(3).flatten(1, 2).repeat(q.shape[1], 1, 1)
    high, wide = len(down.queries), len(across.queries)
    if not torch.is_grad_enabled():  # else all keys are kept, whatever is computed at once
        most = max(1, AT_ONCE // max(1, q.shape[1] * q.shape[2] * hidden[0, 0].numel()))
        high, wide = max(1, most // wide), min(wide, most)
    for some, mask in _split(down, bias, 0, high):
        for other, own in _split(across, mask, 1, wide):
            queries, keys = (_places(*pair, width) for pair in ((some.queries, other.queries), (some.keys, other.keys)))
            mine, theirs, values = (
                x.index_select(0, places.flatten()).view(*places.shape, -1, x.shape[-1]).transpose(1, 2)
                for x, places in ((q, queries), (k, keys), (v, keys))
            )  # (blocks, B H, tokens, D)
            out = F.scaled_dot_product_attention(mine, theirs, values, attn_mask=own.flatten(0, 1), scale=1.0)
            yield unflatten(out.transpose(1, 2).flatten(0, 1), 1, q.shape[1:3]), queries.flatten()


def _places(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """The places `(t s, m n)` on a grid of that width of rows `(t, m)` and columns `(s, n)`."""
    return (rows[:, None, :, None] * width + columns[:, None]).flatten(2).flatten(0, 1)


def _split(blocks: Blocks, bias: Tensor, dim: int, count: int) -> Iterator[tuple[Blocks, Tensor]]:
    """The blocks, so many at a time, and their part of `bias`, which has them at `dim`."""
    queries, keys = blocks.queries.split(count), blocks.keys.split(count)
    biases = bias.split(count, dim) if bias.shape[dim] > 1 else [bias] * len(queries)
    for mine, theirs, own in zip(queries, keys, biases, strict=True):
        yield blocks._replace(queries=mine, keys=theirs), own


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
        hidden = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
        patterns, which = torch.stack([seen.long(), offset], dim=-1).unique(dim=0, return_inverse=True)
        whole = Blocks(queries, keys, hidden, offset)
        alike = [torch.nonzero(which == i)[:, 0] for i in range(len(patterns))]
        blocks = (Blocks(queries[some], keys[some], hidden[some[:1]], offset[some[:1]]) for some in alike)
        return Axis(side, tuple(blocks), whole)
