"""Swin's windows: how a grid is cut into them, and attention in one with a relative position bias."""

import math
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table_simple, trunc_normal_
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Attention
from linsight.ops import FittedTable, Grid, LayoutLike


class WindowAttention(Attention):
    """Attention in a window, with Swin's relative position bias: a table `((2h-1) * (2w-1), heads)` for the scores."""

    relative_position_index: Tensor

    def __init__(self, *args: Any, window: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = window
        table = self.proj.weight.new_zeros(_places(window), self.num_heads)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Which row of the table each pair of tokens reads; for timm to call after `to_empty`, too."""
        index = get_relative_position_index(*self.window, device=self.relative_position_bias_table.device)
        self.register_buffer("relative_position_index", index.flatten(), persistent=False)

    def forward(self, x: Tensor, layout: LayoutLike, *, score_bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """See `Attention.forward`; `x` are the tokens of one window."""
        area = self.window[0] * self.window[1]
        bias: Tensor = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.unflatten(0, (area, area)).permute(2, 0, 1)[None]  # (1, heads, area, area)
        return super().forward(x, layout, score_bias=bias if score_bias is None else bias + score_bias, **kwargs)

    def fit_table(self, name: str, table: Tensor) -> FittedTable | None:
        """A published table of another window, resampled to ours."""
        return fit_bias_table(table, self.window) if name == "relative_position_bias_table" else None

    def set_window(self, window: tuple[int, int]) -> None:
        """Resample the table to another window, for good; bicubic, as published tables are."""
        if window != self.window:
            old = self.relative_position_bias_table
            rows = old.detach().T.unflatten(1, tuple(2 * side - 1 for side in self.window))[None]
            new = F.interpolate(rows, tuple(2 * side - 1 for side in window), mode="bicubic")[0].flatten(1).T
            self.relative_position_bias_table = nn.Parameter(new.contiguous(), old.requires_grad)
            self.window = window
            self.init_non_persistent_buffers()


def fit_bias_table(table: Tensor, window: tuple[int, int]) -> FittedTable | None:
    """A bias table `(places, heads)` of a square window, for another window; bicubic, as published."""
    side = math.isqrt(len(table))
    if table.ndim != 2 or side * side != len(table) or side % 2 == 0:
        return None
    resized = resize_rel_pos_bias_table_simple(table, window, (_places(window), table.shape[1]))
    return FittedTable(resized, ((side + 1) // 2, (side + 1) // 2), window)


def _places(window: tuple[int, int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def to_multiple(side: int, size: int) -> int:
    """The least multiple of `size` that is not below `side`; in a form that stays short in a graph."""
    return (side + size - 1) // size * size


class Windows:
    """How the tokens of a grid are cut into windows, shifted cyclically.

    The grid is padded at the bottom and right to whole windows, then rolled by the shift, so the last
    windows hold tokens from opposite rims: up to three regions a side, which do not see each other.

    always: shift a side of one window, too.
    """

    def __init__(self, grid: Grid, window: tuple[int, int], shift: tuple[int, int], *, always: bool = False) -> None:
        self.grid, self.window = grid, window
        self.padded = tuple(to_multiple(side, size) for side, size in zip(grid[:2], window, strict=True))
        # A side of one window is not shifted.
        self.shift = tuple(
            step if step and (always or side > size) else 0
            for step, side, size in zip(shift, self.padded, window, strict=True)
        )

    @property
    def inner(self) -> Grid:
        """The grid of one window."""
        return Grid(*self.window)

    def cut(self, x: Tensor) -> Tensor:
        """`(B, H*W, C)` -> `(B * windows, h*w, C)`, those of an image together."""
        grid, (height, width) = self.grid, self.padded
        x = F.pad(x.unflatten(1, grid[:2]), (0, 0, 0, width - grid.width, 0, height - grid.height))
        return self._cut(self._roll(x, -1))

    def join(self, x: Tensor) -> Tensor:
        """The other way."""
        (h, w), (height, width) = self.window, self.padded
        x = x.unflatten(0, (-1, height // h, width // w)).unflatten(3, (h, w))
        x = self._roll(x.transpose(2, 3).flatten(3, 4).flatten(1, 2), 1)
        if torch.compiler.is_compiling():  # not by slices: a graph would ask whether they are all there is
            for axis, side in ((1, self.grid.height), (2, self.grid.width)):
                x = x.index_select(axis, torch.arange(side, device=x.device))
        else:
            x = x[:, : self.grid.height, : self.grid.width]
        return x.flatten(1, 2)

    def keep(self, like: Tensor) -> Tensor | None:
        """`(windows, h*w)` bool, False for padding; None where there is none."""
        # In a graph, whether there is padding must not be asked: each answer would be a graph of its own.
        if not torch.compiler.is_compiling() and self.padded == tuple(self.grid[:2]):
            return None
        rows, columns = (
            torch.arange(padded, device=like.device) < side
            for padded, side in zip(self.padded, self.grid[:2], strict=True)
        )
        inside = (rows[:, None] & columns)[None, ..., None]
        return self._cut(self._roll(inside, -1))[..., 0]

    def apart(self, like: Tensor) -> Tensor | None:
        """`(windows, 1, h*w, h*w)`, -100 between tokens of different regions; None without a shift."""
        if not any(self.shift):
            return None
        regions = []
        for padded, size, shift in zip(self.padded, self.window, self.shift, strict=True):
            place = torch.arange(padded, device=like.device)
            regions.append((place >= padded - size).long() + (place >= padded - shift))
        region = self._cut((3 * regions[0][:, None] + regions[1])[None, ..., None])[..., 0]
        return -100.0 * (region[:, None, :, None] != region[:, None, None, :]).to(like.dtype)

    def _roll(self, x: Tensor, sign: int) -> Tensor:
        return x.roll([sign * step for step in self.shift], (1, 2)) if any(self.shift) else x

    def _cut(self, x: Tensor) -> Tensor:
        (h, w), (height, width) = self.window, self.padded
        x = x.unflatten(2, (width // w, w)).unflatten(1, (height // h, h))  # (B, rows, h, columns, w, C)
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def within(window: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """A window that is not larger than the grid."""
    return min(window[0], grid[0]), min(window[1], grid[1])


def half_shift(window: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Half a window, along a side that has more than one."""
    rows, columns = (size // 2 if side > size else 0 for size, side in zip(window, grid, strict=True))
    return rows, columns
