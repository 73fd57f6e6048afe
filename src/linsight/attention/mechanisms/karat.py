"""Kolmogorov-Arnold attention: a learned Fourier series of each row of scores in the place of softmax, at O(N^2).

Maity et al., "Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?" (arXiv 2503.10632),
by its formula. Per head, for a row of scores a_q = d^(-1/2) q_i . k_q over the keys q,

    phi_p = sum_q sum_(m = 1..G) [alpha_pqm cos(m a_q) + beta_pqm sin(m a_q)],   p = 1..r
    o_i = sum_q (sum_p W_qp phi_p) v_q

without any norm, as the publication leaves it off; outputs are linear in the values. Each layer and head has alpha,
beta and W of its own. The product of W and v is made first, so that weights of a row are never written.

The publication has the tables for one number of tokens. Here they lie on a grid of images: on another grid they are
resampled bilinearly, times the ratio of both numbers of tokens, so that sums over more keys stay as large. A key is
weighed by its place, so to drop one is not to remove it: dropped tokens are refused, and so are prefix tokens, which
have no place. Padded images each have the grid of their own size. Everything is computed in float32 (float64 for
float64).
"""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import (
    FittedTable,
    Grid,
    Layout,
    Tile,
    accumulator,
    fit_grid,
    fit_square,
    full_precision,
    mask_tokens,
    table_for,
    unflatten,
)

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core
from ..on_grid import OnGrid
from ..registry import Paper, register
from ..tokens import Tokens

_GRID = (14, 14)  # of the tables, where nobody says: that of a ViT at 224 pixels
_TABLES = ("alpha", "beta", "weight")


@register(
    "karat",
    formula="o_i = sum_q (sum_p W_qp phi_p) v_q, phi_p = sum_q sum_m alpha_pqm cos(m a_q) + beta_pqm sin(m a_q), "
    "a_q = d^(-1/2) q_i . k_q",
    latex=r"o_i = \sum_q \left( \sum_p W_{qp} \phi_p \right) v_q, \quad \phi_p = \sum_q \sum_{m = 1}^G \left( "
    r"\alpha_{pqm} \cos(m a_q) + \beta_{pqm} \sin(m a_q) \right), \quad a_q = d^{-1/2} q_i \cdot k_q",
    family="scores",
    complexity="O(N^2 (d + r G))",
    paper=Paper("Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?", "2503.10632"),
)
class KArAt(OnGrid, Core):
    """Attention by a Fourier series of scores.

    Args:
        rank: r, of the map from scores to weights.
        frequencies: G; published are 3 for small models and 1 for larger ones.
    """

    capabilities = Capabilities(sizes=True)
    structure = Structure(cost=Cost.QUADRATIC)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rank: int = 12,
        frequencies: int = 3,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1 or frequencies < 1:
            raise LinsightError(f"rank={rank} and frequencies={frequencies} of 'karat' must be 1 or more")
        self.num_heads = num_heads
        self.size = (grid[0], grid[1]) if grid else _GRID
        places = self.size[0] * self.size[1]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.empty(num_heads, frequencies, rank, places, **factory))
        self.beta = nn.Parameter(torch.empty(num_heads, frequencies, rank, places, **factory))
        self.weight = nn.Parameter(torch.empty(num_heads, rank, places, **factory))
        for table in (self.alpha, self.beta):
            nn.init.normal_(table, std=(places * frequencies) ** -0.5)
        nn.init.normal_(self.weight, std=(places * rank) ** -0.5)

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """The series of the scores of each query, times what W makes of the values."""
        dtype, tile = accumulator(tokens.v.dtype), Tile.whole(layout.grid, layout.sizes)
        q, k, v = (mask_tokens(x, tokens.keep).to(dtype).transpose(1, 2) for x in tokens[:3])  # (B, H, N, d)
        alpha, beta, weight = (self.placed_table(getattr(self, name), tile, tokens.keep) for name in _TABLES)
        with full_precision(q):
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            series = torch.zeros_like(scores[..., :1])
            for m in range(alpha.shape[2]):
                angles = (m + 1) * scores
                series = (
                    series
                    + angles.cos() @ alpha[:, :, m].transpose(-2, -1)
                    + angles.sin() @ beta[:, :, m].transpose(-2, -1)
                )
            return (series @ (weight @ v)).transpose(1, 2).to(tokens.v.dtype)

    def placed_table(self, table: Tensor, tile: Tile, keep: Tensor | None) -> Tensor:
        """A table `(H, ..., N)` for the keys of `tile`: `(1 or B, H, ..., n)`, in the accumulator's dtype."""
        rows = table_for(as_rows(table), self.size, tile, "bilinear")  # (1 or B, n, H * ...)
        own = self.size[0] * self.size[1]
        if keep is not None:  # padding is the only thing that may be dropped
            rows = mask_tokens(rows, keep) * (own / keep.sum(dim=1, dtype=rows.dtype).clamp(min=1)[:, None, None])
        else:
            rows = rows * (own / tile.grid.tokens)
        return unflatten(rows.transpose(1, 2), 1, table.shape[:-1])

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the tables to another grid of keys, for good."""
        new = (grid[0], grid[1])
        if new == self.size:
            return
        whole = Tile.whole(Grid(*new))
        for name in _TABLES:
            old = getattr(self, name)
            moved = self.placed_table(old.detach(), whole, None)[0].to(old.dtype).contiguous()
            setattr(self, name, nn.Parameter(moved, old.requires_grad))
        self.size = new

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The grid of the tables."""
        return dict.fromkeys(_TABLES, self.size)

    def fit_table(self, name: str, table: Tensor, old: tuple[int, int] | None = None) -> FittedTable | None:
        """A table of the grid `old`, of a square one where that is None, resampled to ours."""
        own = getattr(self, name) if name in _TABLES else None
        if own is None or table.ndim != own.ndim or table.shape[:-1] != own.shape[:-1]:
            return None
        rows = as_rows(table)
        fitted = fit_grid(rows, old, self.size, "bilinear") if old else fit_square(rows, self.size, "bilinear")
        if fitted is None:
            return None
        moved = fitted.tensor[0].T.unflatten(0, own.shape[:-1]) * (table.shape[-1] / own.shape[-1])
        return fitted._replace(tensor=moved.contiguous())


def as_rows(table: Tensor) -> Tensor:
    """A table `(H, ..., N)` as `(1, N, H * ...)`, a row for each place."""
    return table.flatten(0, -2).T[None]
