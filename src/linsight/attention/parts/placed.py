"""Kernel cores whose keys have places on a table, with a convolution of v whose kernel all heads share."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import FittedTable, Grid, Mode, Tile, accumulator, fit_grid, fit_square, pad_prefix, table_for

from ..capabilities import Capabilities, Structure
from ..on_grid import OnGrid
from ..rounds import Round
from ..tokens import Tokens, split_heads
from .kernel import KernelCore, KernelMeans
from .token_conv import TokenConv, convolved_values, grid_values


class PlacedKernel(OnGrid, KernelCore):
    """A kernel core with `positions`, a learnable table on the grid of the keys, and `dwc`, the convolution.

    Prefix tokens have no place and no convolution. Keys of a reduced grid, as in PVT: their v is brought back to all
    tokens for the convolution by linear interpolation along the flattened sequence.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    rounds: tuple[Round, ...] = (KernelMeans(),)
    resampling: ClassVar[Mode] = "bicubic"  # of the table, for another grid

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int,
        grid: tuple[int, int] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            name = type(self).__name__.lower()
            raise LinsightError(f"kernel_size={kernel_size} of '{name}' must be odd, so that it has a middle")
        self.num_heads = num_heads
        self.halo = kernel_size // 2
        self.size = grid or (0, 0)  # of the table
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        places = self.size[0] * self.size[1]
        self.positions = nn.Parameter(torch.zeros(1, places, dim, **factory)) if grid else None
        self.dwc = TokenConv(dim // num_heads, kernel_size, repeats=num_heads, **factory)

    def at_places(self, k: Tensor, tile: Tile) -> Tensor:
        """Keys `(B, n, H, D)` of `tile` with their positions, in the accumulator's dtype; if there is a table."""
        if self.positions is None:
            return k
        table = table_for(self.positions, self.size, tile, self.resampling).to(accumulator(k.dtype))
        return k + split_heads(pad_prefix(table, tile.prefix), self.num_heads)

    def local(self, tokens: Tokens, tile: Tile) -> Tensor:
        """conv(v)."""
        return convolved_values(self.dwc, tokens, tile)

    def lift(self, tokens: Tokens, keys: Tile, queries: Tile) -> Tokens:
        """v of all tokens, by linear interpolation along the flattened sequence."""
        v = grid_values(tokens, keys).transpose(1, 2)
        v = v.to(accumulator(v.dtype))
        v = F.interpolate(v, queries.height * queries.width, mode="linear").transpose(1, 2)
        return tokens._replace(v=split_heads(v, self.num_heads))

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the table, if there is one, to another grid of keys."""
        if self.positions is None or tuple(grid) == tuple(self.size):
            return
        table = table_for(self.positions.detach(), self.size, Tile.whole(Grid(*grid)), self.resampling)
        self.positions = nn.Parameter(table.to(self.positions.dtype), self.positions.requires_grad)
        self.size = (grid[0], grid[1])

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The grid of the positions."""
        return {} if self.positions is None else {"positions": self.size}

    def fit_table(self, name: str, table: Tensor, old: tuple[int, int] | None = None) -> FittedTable | None:
        """A published table of the grid `old`, of a square one where that is None, resampled to ours."""
        if name != "positions" or self.positions is None:
            return None
        return (
            fit_grid(table, old, self.size, self.resampling) if old else fit_square(table, self.size, self.resampling)
        )
