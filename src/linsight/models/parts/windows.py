"""Attention in one of Swin's windows, with a relative position bias."""

import math
from typing import Any

from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Attention, OnGrid
from linsight.ops import FittedTable, LayoutLike, unflatten


class WindowAttention(OnGrid, Attention):
    """Attention in a window, with Swin's relative position bias: a table `((2h-1) * (2w-1), heads)` for the scores."""

    def __init__(self, *args: Any, window: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = window
        table = self.proj.weight.new_zeros(_places(window), self.num_heads)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))

    def forward(self, x: Tensor, layout: LayoutLike, *, score_bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """See `Attention.forward`; `x` are the tokens of one window."""
        bias = self.bias()
        return super().forward(x, layout, score_bias=bias if score_bias is None else bias + score_bias, **kwargs)

    def bias(self) -> Tensor:
        """The bias of each pair of tokens of the window, `(1, heads, h*w, h*w)`.

        Token (i, j) reads of (k, l) the row for i - k and j - l. No buffer tells which one that is: libraries that
        build models without memory would have to know that it must be filled again.
        """
        h, w = self.window
        rows = unflatten(self.relative_position_bias_table, 0, (2 * h - 1, 2 * w - 1))
        pairs = rows.unfold(0, h, 1).unfold(1, w, 1).flip(-2, -1)  # (h, w, heads, h, w)
        return pairs.permute(2, 0, 1, 3, 4).reshape(1, self.num_heads, h * w, h * w)

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The window of the bias table."""
        return {"relative_position_bias_table": self.window}

    def fit_table(self, name: str, table: Tensor, old: tuple[int, int] | None = None) -> FittedTable | None:
        """A published table of another window, in a grid of `old` where that is told, resampled to ours."""
        return fit_bias_table(table, self.window, old) if name == "relative_position_bias_table" else None

    def set_window(self, window: tuple[int, int]) -> None:
        """Resample the table to another window, for good; bicubic, as published tables are."""
        if window != self.window:
            old = self.relative_position_bias_table
            rows = unflatten(old.detach().T, 1, tuple(2 * side - 1 for side in self.window))[None]
            new = F.interpolate(rows, tuple(2 * side - 1 for side in window), mode="bicubic")[0].flatten(1).T
            self.relative_position_bias_table = nn.Parameter(new.contiguous(), old.requires_grad)
            self.window = window


def fit_bias_table(table: Tensor, window: tuple[int, int], grid: tuple[int, int] | None = None) -> FittedTable | None:
    """A bias table `(places, heads)` of a square window, for another window; bicubic, as published.

    grid: that of the stage it was made for, which cuts a window where that reaches beyond; the window itself is one.
    """
    if table.ndim != 2:
        return None
    side = (math.isqrt(len(table)) + 1) // 2
    cuts = ((min(n, grid[0]), min(n, grid[1])) for n in range(1, max(grid) + 1)) if grid else [(side, side)]
    old = next((cut for cut in cuts if _places(cut) == len(table)), None)
    if old is None:
        return None
    sides = [2 * n - 1 for n in old], [2 * n - 1 for n in window]
    rows = table.detach().T.unflatten(1, sides[0])[None].float()
    resized = F.interpolate(rows, sides[1], mode="bicubic", align_corners=False)[0].flatten(1).T
    return FittedTable(table if old == window else resized.to(table.dtype), old, window)


def _places(window: tuple[int, int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)
