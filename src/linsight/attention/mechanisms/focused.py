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

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Features,
    FittedTable,
    Grid,
    Layout,
    LinearState,
    State,
    Tile,
    accumulator,
    count_tokens,
    depthwise_conv,
    fit_square,
    focus,
    full_precision,
    linear_absorb,
    linear_read,
    pad_prefix,
    table_for,
)

from ..core import Capabilities, Core, Rename, Tokens, split_heads
from ..parts.token_conv import grid_values
from ..registry import Paper, register


class FocusedState(NamedTuple):
    """sums: over the mapped keys.  count: `(B,)` tokens absorbed."""

    sums: LinearState
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


@register(
    "focused",
    formula="o = phi(q) mean(phi(k + P) v^T) / (phi(q) . mean(phi(k + P)) + eps) + conv(v), phi(u) = |u| u^p / |u^p|",
    complexity="O(N d^2)",
    paper=Paper("FLatten Transformer: Vision Transformer using Focused Linear Attention", "2308.00442", "ICCV 2023"),
)
class Focused(Core):
    """Linear attention with a norm-preserving power map and a depthwise convolution of v.

    Args:
        power: p, above 0. Every published model uses 3.
        kernel_size: side of the depthwise kernel, odd.
    """

    capabilities = Capabilities(keep=True, sizes=True, reduced=True, stream=True, prefix=True)
    halos = (0, 2)
    published = (
        Rename("scale", "core.scale"),
        Rename("positional_encoding", "core.positions"),
        Rename("dwc.", "core.dwc."),
    )
    eps = 1e-6

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
        self.halos = (0, kernel_size // 2)
        self.size = grid or (0, 0)  # of the table
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim // num_heads
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        places = self.size[0] * self.size[1]
        self.positions = nn.Parameter(torch.zeros(1, places, dim, **factory)) if grid else None
        self.dwc = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width, **factory)

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> FocusedState:
        """sum phi(k + P) v^T, sum phi(k + P) and the number of tokens."""
        k = tokens.k
        if self.positions is not None:
            table = table_for(self.positions, self.size, tile, "bicubic").to(accumulator(k.dtype))
            k = k + split_heads(pad_prefix(table, tile.prefix), self.num_heads)
        sums = linear_absorb(self._features(k), tokens.v, tokens.keep)
        return FocusedState(sums, count_tokens(tokens.v, tokens.keep))

    def finish(self, r: int, state: FocusedState, grid: Grid) -> LinearState:
        """The means over the tokens."""
        share = 1 / state.count.clamp(min=1)[:, None, None]
        return LinearState(state.sums.kv * share[..., None], state.sums.k * share)

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """phi(q) against the state, and the convolution of v."""
        return self._read(tokens.q, grid_values(tokens, tile), tile, done[0])

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """The rounds; where keys lie on a coarser grid, v is brought back to that of the queries."""
        if context_layout is None:
            return super().forward(tokens, layout)
        keys, grid = Tile.whole(context_layout.grid, context_layout.sizes), layout.grid
        state = self.finish(0, self.absorb(0, tokens, keys, ()), keys.grid)
        v = grid_values(tokens, keys).transpose(1, 2)
        v = v.to(accumulator(v.dtype))
        v = F.interpolate(v, grid.height * grid.width, mode="linear").transpose(1, 2)
        return self._read(tokens.q, v, Tile.whole(grid), state)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the table, if there is one, to another grid of keys."""
        if self.positions is None or tuple(grid) == tuple(self.size):
            return
        table = table_for(self.positions.detach(), self.size, Tile.whole(Grid(*grid)), "bicubic")
        self.positions = nn.Parameter(table.to(self.positions.dtype), self.positions.requires_grad)
        self.size = (grid[0], grid[1])

    def fit_table(self, name: str, table: Tensor) -> FittedTable | None:
        """A published table of another size, resampled to ours."""
        return fit_square(table, self.size, "bicubic") if name == "positions" and self.positions is not None else None

    def _features(self, x: Tensor) -> Features:
        """phi of `x` `(B, N, H, D)`."""
        scale = self.scale.to(accumulator(x.dtype)).unflatten(-1, (self.num_heads, -1))
        return focus(x, 1 / F.softplus(scale[0, 0]), self.power)

    def _read(self, q: Tensor, v: Tensor, tile: Tile, state: LinearState) -> Tensor:
        """Outputs of `tile`; `v` `(B, n, C)` lies on the part of the grid that it sees."""
        assert self.dwc.bias is not None
        weight = self.dwc.weight.to(state.kv.dtype).repeat(self.num_heads, 1, 1, 1)
        bias = self.dwc.bias.to(state.kv.dtype).repeat(self.num_heads)
        with full_precision(v):
            local = tile.inner_grid(depthwise_conv(v, tile.seen, weight, bias))
        local = split_heads(local, self.num_heads)
        return linear_read(self._features(tile.inner(q)), state, self.eps, add=local, dtype=q.dtype)
