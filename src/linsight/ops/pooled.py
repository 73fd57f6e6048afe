"""Attention through a few pooled tokens, n of them: they gather from all keys, and every query reads from them.

Axes: B batch, N keys, M queries, n pooled tokens, H heads, D query/key width, E value width. Scores are scaled by
D^(-1/2). Both steps are plain attention with an additive bias, so both are O(N n). Everything is computed in the
accumulator's dtype: a pooled token stands for thousands, and an error in it reaches them all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Tile
from .resample import pool_matrix, separable
from .sizes import copied, traced, unflatten
from .states import LogSumExp, accumulator, full_precision, mask_tokens


def pool_tokens(x: Tensor, tile: Tile, size: tuple[int, int]) -> Tensor:
    """The share of the tokens of `tile` in adaptive average pooling of its grid to `size` cells.

    `x` `(B, P + h*w, ...)` without halo; prefix tokens are in no cell. Returns `(B, n, ...)`, cells row by row, in
    the accumulator's dtype; the sum over the tiles of a grid is the pooled grid, of each image's own size where
    the batch is padded.
    """
    dtype, width = accumulator(x.dtype), x.shape[2:]
    canvas = unflatten(x[:, tile.prefix :].to(dtype).flatten(2), 1, (tile.height, tile.width))
    learning = x.requires_grad and torch.is_grad_enabled()
    if tile.is_whole and tile.sizes is None and not learning and not traced():
        # One pass over memory. Its gradient is not deterministic on a GPU, and each size would be a graph of its own.
        pooled = F.adaptive_avg_pool2d(canvas.permute(0, 3, 1, 2), size)
        return unflatten(pooled.permute(0, 2, 3, 1).flatten(1, 2), -1, width)
    sides: tuple[Any, ...] = tile.grid[:2] if tile.sizes is None else tile.sizes.to(x.device).unbind(1)
    places = ((tile.top, tile.height), (tile.left, tile.width))
    rows, columns = (
        pool_matrix(side, cells, start=start, count=count, device=x.device, dtype=dtype)
        for side, cells, (start, count) in zip(sides, size, places, strict=True)
    )
    return unflatten(separable(canvas, rows, columns).flatten(1, 2), -1, width)


def gather_state(pooled: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None = None) -> LogSumExp:
    """The state of some of the keys, of which `gather_pooled` needs the merged one; arguments as there."""
    dtype = accumulator(v.dtype)
    with full_precision(v):
        scores = torch.einsum("bnhd,bahd->bnha", k.to(dtype), pooled.to(dtype) * k.shape[-1] ** -0.5)
        if bias is not None:
            scores = scores + bias.permute(0, 3, 1, 2)
        return LogSumExp.absorb(scores, v, keep)


def gather_pooled(pooled: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor | None = None) -> Tensor:
    """Means of v under softmax over the keys: `(B, H, n, E)`, in the accumulator's dtype.

    `pooled` `(B, n, H, D)`, `k` `(B, N, H, D)`, `v` `(B, N, H, E)`, `bias` `(B or 1, H, n, N)`, `keep` `(B, N)` with
    at least one key kept. Equal to `gather_state(...).mean()`.
    """
    if keep is not None:
        k, v, seen = mask_tokens(k, keep), mask_tokens(v, keep), keep[:, None, None]
        bias = seen if bias is None else bias.masked_fill(~seen, float("-inf"))
    return _attend(pooled, k, v.transpose(1, 2), bias)


def read_pooled(q: Tensor, pooled: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Means of `values` `(B, H, n, E)` under softmax over the pooled tokens: `(B, M, H, E)`.

    `q` `(B, M, H, D)`, `pooled` `(B, n, H, D)`, `bias` `(B or 1, H, M, n)`. In the accumulator's dtype.
    """
    return _attend(q, pooled, values, bias).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulator(v.dtype)
    with full_precision(v):
        return attend(q.transpose(1, 2).to(dtype), k.transpose(1, 2).to(dtype), v.to(dtype), bias)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's scaled dot-product attention, of heads `(B, H, N, D)`; `scale` in the place of D^(-1/2).

    How its output lies in memory is the kernel's, and another one in a graph that leaves: what views it goes by a copy.
    """
    return copied(F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale))
