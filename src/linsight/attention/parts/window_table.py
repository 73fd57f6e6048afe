"""Swin's relative position bias: a number for each head and distance of two tokens in a window, added to scores."""

import math
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import FittedTable, unflatten

from ..on_grid import OnGrid


class WindowTable(OnGrid):
    """A mixin, in front of a module's class, for one with a table `((2h-1) * (2w-1), heads)` of a window of h x w.

    Liu et al., "Swin Transformer", ICCV 2021 (arXiv 2103.14030). The module calls `make_table` in its constructor.
    """

    window: tuple[int, int]
    relative_position_bias_table: nn.Parameter

    def make_table(self, window: tuple[int, int], num_heads: int, **factory: Any) -> None:
        """Set the table, at random, and its window."""
        self.window = window
        table = torch.empty(_places(window), num_heads, **factory)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))

    def bias(self) -> Tensor:
        """The bias of each pair of tokens of the window, `(1, heads, h*w, h*w)`.

        Token (i, j) reads of (k, l) the row for i - k and j - l. No buffer tells which one that is: libraries that
        build models without memory would have to know that it must be filled again.
        """
        h, w = self.window
        rows = unflatten(self.relative_position_bias_table, 0, (2 * h - 1, 2 * w - 1))
        pairs = rows.unfold(0, h, 1).unfold(1, w, 1).flip(-2, -1)  # (h, w, heads, h, w)
        return pairs.permute(2, 0, 1, 3, 4).reshape(1, -1, h * w, h * w)

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
