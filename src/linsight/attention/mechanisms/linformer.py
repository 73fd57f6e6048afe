"""Linformer: softmax attention to k sums of the keys, whose weights are learned for each place.

Wang et al., "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768. Per head, with K' = E K and V' = E V,

    o_i = sum_a softmax_a(d^(-1/2) q_i . K'_a) V'_a

where E (heads, k, N) is one for keys and values, started as N(0, 0.02) and not normalised.

The publication has E for one length of a text. Here it lies on a grid of images: on another grid it is resampled
bicubically, times the ratio of both numbers of tokens, so that a sum over more tokens stays as large. As that is a
linear map of rows and one of columns, tokens are brought to the grid of E by their transposes, and E is applied to what
comes out: no weight of each token is ever made. Prefix tokens read; they have no weight among the keys, unless the
layer is made with one for all of them (`prefix_weight`). A token is weighed by its place, so to drop one is not to
remove it: dropped tokens are refused. Padded images each have the grid of their own size. FLARE's form, with a matrix
for keys and one for values that all heads share, is left out.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import (
    FittedTable,
    Grid,
    Tile,
    accumulator,
    count_tokens,
    fit_grid,
    fit_square,
    full_precision,
    mask_tokens,
    read_pooled,
    resize_matrix,
    separable,
    table_for,
    unflatten,
)

from ..capabilities import Capabilities, Structure
from ..core import Core
from ..on_grid import OnGrid
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_GRID = (14, 14)  # of E, where nobody says: that of a ViT at 224 pixels


class Resampled(NamedTuple):
    """Keys and values side by side, on the grid of E.

    places: `(B, h*w, H, D + E)`.  prefix: `(B, H, D + E)`, the sum of prefix tokens.  count: `(B,)` tokens of the grid.
    """

    places: Tensor
    prefix: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class Sums(NamedTuple):
    """K' `(B, k, H, D)` and V' `(B, H, k, E)`."""

    keys: Tensor
    values: Tensor


class Projected(Round):
    """E K and E V."""

    placed = True

    def absorb(self, core: "Linformer", tokens: Tokens, tile: Tile, done: Done) -> Resampled:
        """The tile's tokens, by the transposes of what would bring E to them."""
        x = mask_tokens(torch.cat([tokens.k, tokens.v], dim=-1), tokens.keep)
        x = x.to(accumulator(x.dtype))
        grid = tile.grid
        factory: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
        lengths: Any = (grid.height, grid.width) if tile.sizes is None else tile.sizes.to(x.device).unbind(1)
        places = ((tile.top, tile.height), (tile.left, tile.width))
        rows, columns = (
            resize_matrix(old, new, "bicubic", start=start, count=count, **factory).transpose(-1, -2)
            for old, new, (start, count) in zip(core.size, lengths, places, strict=True)
        )
        canvas = unflatten(x[:, tile.prefix :].flatten(2), 1, (tile.height, tile.width))
        brought = unflatten(separable(canvas, rows, columns).flatten(1, 2), -1, x.shape[2:])
        keep = None if tokens.keep is None else tokens.keep[:, tile.prefix :]
        return Resampled(brought, x[:, : tile.prefix].sum(dim=1), count_tokens(x[:, tile.prefix :], keep))

    def finish(self, core: "Linformer", state: Resampled, done: Done) -> Sums:
        """E times what lies on its grid."""
        table = core.E.to(state.places.dtype)
        ratio = table.shape[-1] / state.count.clamp(min=1)
        with full_precision(table):
            sums = torch.einsum("hkn,bnhc->bhkc", table, state.places * ratio[:, None, None, None])
        if core.prefix_weight is not None:
            sums = sums + core.prefix_weight.to(sums.dtype)[..., None] * state.prefix[:, :, None]
        keys, values = sums.split([core.width, sums.shape[-1] - core.width], dim=-1)
        return Sums(keys.transpose(1, 2), values)


@register(
    "linformer",
    formula="o_i = sum_a softmax_a(d^(-1/2) q_i . (E K)_a) (E V)_a, E learned, k x N",
    latex=r"o_i = \sum_a \mathrm{softmax}_a(d^{-1/2} q_i \cdot (E K)_a) (E V)_a, \quad E \in \mathbb{R}^{k \times N}",
    family="low rank",
    complexity="O(N k d)",
    paper=Paper("Linformer: Self-Attention with Linear Complexity", "2006.04768"),
)
class Linformer(OnGrid, Core):
    """Softmax attention to learned sums of the keys.

    Args:
        rank: k.
        prefix_weight: weights of prefix tokens among the keys, which all of them share; else they only read.
    """

    capabilities = Capabilities(sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    rounds = (Projected(),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rank: int = 64,
        prefix_weight: bool = False,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise LinsightError(f"rank={rank} of 'linformer' must be 1 or more; publications have 64 to 256")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.width = num_heads, dim // num_heads
        self.size = (grid[0], grid[1]) if grid else _GRID
        self.E = nn.Parameter(torch.empty(num_heads, rank, self.size[0] * self.size[1], **factory))
        nn.init.normal_(self.E, std=0.02)
        self.prefix_weight = None
        if prefix_weight:
            self.prefix_weight = nn.Parameter(torch.empty(num_heads, rank, **factory))
            nn.init.normal_(self.prefix_weight, std=0.02)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Means of V' under softmax over K'."""
        return read_pooled(tokens.q, done[0].keys, done[0].values, None).to(tokens.q.dtype)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample E to another grid of keys, for good."""
        if tuple(grid) == self.size:
            return
        new = (grid[0], grid[1])
        rows = table_for(as_rows(self.E.detach()), self.size, Tile.whole(Grid(*new)), "bicubic")
        rows = rows * (self.size[0] * self.size[1] / (new[0] * new[1]))
        self.E = nn.Parameter(as_rows(rows, self.num_heads).to(self.E.dtype), self.E.requires_grad)
        self.size = new

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The grid of E."""
        return {"E": self.size}

    def fit_table(self, name: str, table: Tensor, old: tuple[int, int] | None = None) -> FittedTable | None:
        """E of the grid `old`, of a square one where that is None, resampled to ours."""
        if name != "E" or table.ndim != 3 or table.shape[:2] != self.E.shape[:2]:
            return None
        rows = as_rows(table)
        fitted = fit_grid(rows, old, self.size, "bicubic") if old else fit_square(rows, self.size, "bicubic")
        if fitted is None:
            return None
        ratio = table.shape[-1] / self.E.shape[-1]
        return fitted._replace(tensor=as_rows(fitted.tensor * ratio, self.num_heads))


def as_rows(table: Tensor, num_heads: int = 0) -> Tensor:
    """E `(H, k, N)` as a table `(1, N, H * k)`, a row for each place; with `num_heads`, back."""
    if num_heads:
        return table[0].unflatten(-1, (num_heads, -1)).permute(1, 2, 0).contiguous()
    return table.permute(2, 0, 1).flatten(1)[None]
