"""A bias on scores that a small MLP makes of the distance of two tokens on the grid, on a logarithmic scale."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import accumulator, full_precision, traced, unflatten

from .wide import WideLinear

_HIDDEN = 512
_FULL = 8.0  # what a distance of the whole grid counts as


class LogDistance(nn.Module):
    """b(q, k) of each head, an MLP of u = sign(r) log2(1 + |r|) / 3, r = 8 (p_q - p_k) / (P - 1), down and across.

    Liu et al., "Swin Transformer V2", CVPR 2022 (arXiv 2111.09883), in the form of TransNeXt (arXiv 2311.17132). P are
    the sides of `grid`, on which weights are trained, whatever the grid is on which they are used.
    """

    def __init__(self, num_heads: int, grid: tuple[int, int], *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.grid = grid
        self.fc1 = WideLinear(2, _HIDDEN, device=device, dtype=dtype)
        self.fc2 = WideLinear(_HIDDEN, num_heads, device=device, dtype=dtype)

    def forward(self, like: Tensor, queries: tuple[Any, Any], cells: tuple[Any, Any] | None = None) -> Tensor:
        """`(H, M, N)`, in the accumulator's dtype, for the tokens of a grid of height and width `queries`.

        like: a tensor of their dtype and on their device.
        cells: height and width of the grid of keys, which lie in the middle of what adaptive pooling averages; None
            where these are the tokens themselves.
        """
        dtype = accumulator(like.dtype)
        (down, rows), (across, columns) = (
            offsets(side, None if cells is None else cells[axis], like.device) for axis, side in enumerate(queries)
        )
        down, across = (
            _on_log_scale(distance.to(dtype) * (_FULL / max(side - 1, 1)))
            for distance, side in zip((down, across), self.grid, strict=True)
        )
        u = torch.stack(torch.broadcast_tensors(down[:, None], across[None]), dim=-1).flatten(0, 1)
        with full_precision(u):
            table = self.fc2(F.relu(self.fc1(u)))
        at = rows[:, None, :, None] * across.shape[0] + columns[None, :, None, :]  # (H, W, h, w)
        bias = unflatten(table.index_select(0, at.flatten()), 0, at.shape)
        return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


def _on_log_scale(r: Tensor) -> Tensor:
    return r.sign() * (1 + r.abs()).log2() / 3


def offsets(side: Any, cells: Any | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """All distances of a place of a side to a key, and where among them that of each pair `(side, cells)` is.

    Keys lie at whole places and between two, so half places are enough; where all cells are alike, whole steps are.
    """
    place = torch.arange(side, device=device)[:, None]
    if cells is None or (not traced() and side % cells == 0):
        count = side if cells is None else cells
        ratio = 1 if cells is None else side // cells
        index = place + (side - ratio) - torch.arange(count, device=device) * ratio
        return torch.arange(2 * side - ratio, device=device) - (side - ratio) - (ratio - 1) / 2, index
    cell = torch.arange(cells, device=device)
    first, last = cell * side // cells, ((cell + 1) * side + cells - 1) // cells
    index = 2 * place - (first + last - 1) + 2 * (side - 1)
    return torch.arange(4 * side - 3, device=device) / 2 - (side - 1), index
