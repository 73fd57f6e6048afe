"""Focused linear attention: ReLU kernel attention whose queries and keys are sharpened by a power.

Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023
(arXiv 2308.00442), by its published code. With e = 1e-6 and t a learnable vector of C channels, a
token x, all its heads together, is mapped to

    phi(x) = |u| u^p / |u^p|,   u = (relu(x) + e) / softplus(t),

which keeps the norm and turns the direction towards the largest channels. P is a table of learnable
positions on the grid of the keys. Per head, with the means over the N keys,

    o_i = phi(q_i) mean_j(phi(k_j + P_j) v_j^T) / (phi(q_i) . mean_j(phi(k_j + P_j)) + e) + conv(v)_i,

where conv is a depthwise k x k convolution whose kernel all heads share. The power is taken of
u / max(u), which is the same function and can neither overflow nor vanish.

Keys of a reduced grid, as in PVT: their v is brought back to all N tokens for the convolution by
linear interpolation along the flattened sequence. Prefix tokens, of which the publication has none,
are read and absorbed as all others, without a position and without the convolution.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Features,
    FittedTable,
    Grid,
    Tile,
    accumulator,
    fit_grid,
    fit_square,
    focus,
    pad_prefix,
    table_for,
)

from ..capabilities import Capabilities, Structure
from ..core import Rename
from ..on_grid import OnGrid
from ..parts.kernel import KernelCore, KernelMeans
from ..parts.token_conv import TokenConv, convolved_values, grid_values
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens, split_heads


@register(
    "focused",
    formula="o = phi(q) mean(phi(k + P) v^T) / (phi(q) . mean(phi(k + P)) + eps) + conv(v), phi(u) = |u| u^p / |u^p|",
    latex=r"\begin{aligned} o_i &= \frac{\phi(q_i) \mathrm{mean}_j(\phi(k_j + P_j) v_j^\top)}{\phi(q_i) \cdot "
    r"\mathrm{mean}_j(\phi(k_j + P_j)) + e} + \mathrm{conv}(v)_i \cr "
    r"\phi(x) &= \lVert u \rVert \frac{u^p}{\lVert u^p \rVert}, \quad u = \frac{\mathrm{relu}(x) + "
    r"e}{\mathrm{softplus}(t)} \end{aligned}",
    complexity="O(N d^2)",
    paper=Paper("FLatten Transformer: Vision Transformer using Focused Linear Attention", "2308.00442", "ICCV 2023"),
)
class Focused(OnGrid, KernelCore):
    """Linear attention with a norm-preserving power map and a depthwise convolution of v.

    Args:
        power: p, above 0. Every published model uses 3.
        kernel_size: side of the depthwise kernel, odd.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    rounds = (KernelMeans(),)
    published = (
        Rename("scale", "core.scale"),
        Rename("positional_encoding", "core.positions"),
        Rename("dwc.", "core.dwc."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        power: float = 3,
        kernel_size: int = 5,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not power > 0:
            raise LinsightError(f"power={power} of 'focused' must be above 0; published models use 3")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise LinsightError(f"kernel_size={kernel_size} of 'focused' must be odd, so that it has a middle")
        self.num_heads = num_heads
        self.power = power
        self.halo = kernel_size // 2
        self.size = grid or (0, 0)  # of the table
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim // num_heads
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        places = self.size[0] * self.size[1]
        self.positions = nn.Parameter(torch.zeros(1, places, dim, **factory)) if grid else None
        self.dwc = TokenConv(width, kernel_size, repeats=num_heads, **factory)

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """phi, of keys with their positions."""
        dtype = accumulator(x.dtype)
        if name == "k" and self.positions is not None:
            table = table_for(self.positions, self.size, tile, "bicubic").to(dtype)
            x = x + split_heads(pad_prefix(table, tile.prefix), self.num_heads)
        scale = split_heads(self.scale.to(dtype), self.num_heads)
        return focus(x, 1 / F.softplus(scale[0, 0]), self.power)

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
        table = table_for(self.positions.detach(), self.size, Tile.whole(Grid(*grid)), "bicubic")
        self.positions = nn.Parameter(table.to(self.positions.dtype), self.positions.requires_grad)
        self.size = (grid[0], grid[1])

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The grid of the positions."""
        return {} if self.positions is None else {"positions": self.size}

    def fit_table(self, name: str, table: Tensor, old: tuple[int, int] | None = None) -> FittedTable | None:
        """A published table of the grid `old`, of a square one where that is None, resampled to ours."""
        if name != "positions" or self.positions is None:
            return None
        return fit_grid(table, old, self.size, "bicubic") if old else fit_square(table, self.size, "bicubic")
