"""Neighbourhood attention by torch's FlexAttention: one kernel that skips the blocks of keys no query of a block sees.

Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels" (arXiv 2412.05496). Tokens
are reordered first, so that those of a dilation group lie together and in it those of tiles of 8 x 16: scattered over
the grid they would leave few blocks of 128 tokens to skip.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .neighbourhood import AxisWindow, axis_window

_TILE = (8, 16)  # tokens of a block, by rows and columns


class Axis(NamedTuple):
    """An axis of the grid, for the tokens in their new order: `(n,)` each.

    place: where they are.  first, last: the keys between which each of them sees those in steps of `step`.
    """

    place: Tensor
    first: Tensor
    last: Tensor
    step: int
    kernel: int


class Plan(NamedTuple):
    """The new order, the way back, both axes, and the blocks that are seen."""

    order: Tensor
    back: Tensor
    axes: tuple[Axis, Axis]
    blocks: BlockMask


def neighbourhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sides: tuple[int, int],
    windows: tuple[AxisWindow, AxisWindow],
    table: Tensor | None = None,
) -> Tensor:
    """See `linsight.ops.neighbourhood_attention`, of a whole grid of the height and width `sides`; in the dtype of v.

    Compiled on CUDA, for each grid anew. On a CPU it runs eagerly, as torch's definition, by the matrix of all scores.
    """
    found = plan(sides, windows, v.device)
    q, k, v = (x.to(v.dtype).index_select(1, found.order).transpose(1, 2) for x in (q, k, v))
    change = None if table is None else _biased(found.axes, table)
    run: Any = _compiled(flex_attention) if v.is_cuda else flex_attention
    out = run(q, k, v, score_mod=change, block_mask=found.blocks, scale=q.shape[-1] ** -0.5)
    return out.transpose(1, 2).index_select(1, found.back)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@functools.lru_cache(maxsize=32)
def plan(sides: tuple[int, int], windows: tuple[AxisWindow, AxisWindow], device: torch.device) -> Plan:
    """How attention on a grid is computed; kept, as the next layers and images have the same."""
    rows, columns = (torch.arange(side, device=device) for side in sides)
    steps = [min(window.dilation, max(1, side // window.kernel)) for window, side in zip(windows, sides, strict=True)]
    key = rows.new_zeros(sides)
    parts = [
        _parts(place, step, tile) for place, step, tile in zip((rows, columns), steps, _TILE, strict=True)
    ]  # the group, the tile in it, the place in that
    for down, across in zip(*parts, strict=True):
        for part in (down[:, None], across[None]):
            key = key * (part.max() + 1) + part
    order = key.flatten().argsort()
    y, x = order // sides[1], order % sides[1]
    axes = []
    for place, side, window, step in zip((y, x), sides, windows, steps, strict=True):
        keys, _, seen = axis_window(torch.arange(side, device=device), torch.tensor([[side]], device=device), window)
        first = keys.masked_fill(~seen, side).amin(dim=-1)[0]
        last = keys.masked_fill(~seen, -1).amax(dim=-1)[0]
        axes.append(Axis(place, first[place], last[place], step, window.kernel))
    down, across = axes

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _sees(down, i, j) & _sees(across, i, j)

    make: Callable[..., BlockMask] = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    blocks = make(sees, None, None, order.numel(), order.numel(), device=device)
    return Plan(order, order.argsort(), (down, across), blocks)


def _parts(place: Tensor, step: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    inner = place // step
    return place % step, inner // tile, inner % tile


def _sees(axis: Axis, i: Tensor, j: Tensor) -> Tensor:
    key = axis.place[j]
    return (axis.first[i] <= key) & (key <= axis.last[i]) & ((key - axis.place[i]) % axis.step == 0)


def _biased(axes: tuple[Axis, Axis], table: Tensor) -> Callable[..., Tensor]:
    """A function that adds the bias of its distance to a score; where a pair is not seen, that of any distance."""

    def distance(axis: Axis, i: Tensor, j: Tensor) -> Tensor:
        most = axis.kernel - 1
        return ((axis.place[j] - axis.place[i]) // axis.step + most).clamp(0, 2 * most)

    def change(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[head, distance(axes[0], i, j), distance(axes[1], i, j)]

    return change
