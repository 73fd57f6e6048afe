"""The grid of keys made coarser, as PVT and PVTv2 do."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import Grid, at_least, pool_matrix, traced, unflatten


class Reduction(nn.Module):
    """PVT's spatial reduction of keys and values: a convolution of stride `ratio`, then LayerNorm.

    Floors the grid, as published; a grid smaller than the stride is first padded to it with zeros. With
    `pool`, PVTv2's linear form: average pooling to `pool` x `pool`, a 1x1 convolution, LayerNorm, GELU.
    """

    def __init__(self, dim: int, ratio: int, *, pool: int = 0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.ratio, self.pool = 1 if pool else ratio, pool
        self.sr = nn.Conv2d(dim, dim, self.ratio, stride=self.ratio, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the reduced grid."""
        return reduced(size, self.ratio, self.pool)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """`(B, H*W, C)` -> `(B, h*w, C)` and its grid."""
        canvas = unflatten(x, 1, (grid.height, grid.width)).permute(0, 3, 1, 2)  # (B, C, H, W)
        if self.pool:
            rows, columns = (pool_matrix(n, self.pool, device=x.device, dtype=x.dtype) for n in grid[:2])
            canvas = rows @ canvas @ columns.T
        elif traced() or grid.height < self.ratio or grid.width < self.ratio:
            low, right = (at_least(self.ratio - side, 0) for side in grid[:2])
            canvas = F.pad(canvas, (0, right, 0, low))
        canvas = self.sr(canvas)
        x = self.norm(canvas.flatten(2).transpose(1, 2))
        return F.gelu(x) if self.pool else x, Grid(canvas.shape[2], canvas.shape[3])


def reduced(size: tuple[int, int], ratio: int, pool: int = 0) -> tuple[int, int]:
    """Height and width of the grid of keys that a `Reduction` makes."""
    return (pool, pool) if pool else (max(1, size[0] // ratio), max(1, size[1] // ratio))
