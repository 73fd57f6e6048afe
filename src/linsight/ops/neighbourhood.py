"""Softmax attention of each token to the window around it, by gathering its keys: O(N K^2) for K x K windows.

At the rim of the image a window is shifted inward, so that every query sees K^2 keys, the convention of Hassani et
al., "Neighborhood Attention Transformer", CVPR 2023 (arXiv 2204.07143). A side shorter than K is seen whole.
"""

import torch
from torch import Tensor

from .layout import Tile
from .states import accumulator, full_precision


def neighbourhood_attention(q: Tensor, k: Tensor, v: Tensor, tile: Tile, window: int) -> Tensor:
    """softmax(q.k / sqrt(D)) v over windows of side `window`, for the own grid tokens of `tile`: `(B, n, H, D)`.

    `q`, `k`, `v` `(B, n, H, D)`, finite, are all grid tokens that `tile` sees; a window at the rim reaches
    `window - 1` tokens far, which its halo has to cover. In a padded batch each image has a rim of its own.
    Computed in the accumulator's dtype.
    """
    dtype, batch = accumulator(v.dtype), v.shape[0]
    sizes = (tile.grid.height, tile.grid.width)
    height, width = sizes if tile.sizes is None else tile.sizes.to(v.device)[:, :, None].unbind(1)
    rows, is_row = _nearest(tile.top, tile.height, height, window, tile.rows, v.device)
    columns, is_column = _nearest(tile.left, tile.width, width, window, tile.columns, v.device)
    # (B or 1, h, w, K, K) -> (B or 1, n, K * K)
    places = (rows[:, :, None, :, None] * tile.seen[1] + columns[:, None, :, None, :]).flatten(3).flatten(1, 2)
    inside = (is_row[:, :, None, :, None] & is_column[:, None, :, None, :]).flatten(3).flatten(1, 2)
    images = torch.arange(batch, device=v.device)[:, None, None]
    with full_precision(v):
        q = tile.inner_grid(q).to(dtype) * q.shape[-1] ** -0.5
        scores = torch.einsum("bnhd,bnkhd->bnhk", q, k.to(dtype)[images, places])
        scores = scores.masked_fill(~inside[:, :, None], torch.finfo(dtype).min)
        return torch.einsum("bnhk,bnkhd->bnhd", scores.softmax(dim=-1), v.to(dtype)[images, places])


def _nearest(
    start: int, count: int, total: int | Tensor, window: int, seen: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Along one side: where in `seen` the window of each of `count` places lies, and whether the image reaches there.

    `total` is the length of the side, or that of each image `(B, 1)`. Both results are `(B or 1, count, window)`.
    """
    place = torch.arange(count, device=device)[None] + start
    first = (place - window // 2).clamp(max=total - window).clamp(min=0)
    index = first[..., None] + torch.arange(window, device=device)
    inside = index < (total[..., None] if isinstance(total, Tensor) else total)
    return (index - seen[0]).clamp(min=0).clamp(max=seen[1] - seen[0] - 1), inside
