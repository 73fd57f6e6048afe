"""How tokens lie: grids, padded and packed batches, tiles.

Axes: B batch, N tokens, P prefix tokens, H and W the grid, C channels. A token sequence is
`(B, P + H*W, C)`: prefix tokens (class, registers) first, then the grid row by row. Sizes are
always given, never deduced from N.
"""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral, Number
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.errors import LinsightError

from .sizes import traced, unflatten


class Grid(NamedTuple):
    """A grid of `height * width` tokens behind `prefix` tokens that have no place on it.

    Raises:
        LinsightError: one of them is not a whole number, or is below 0.
    """

    height: int
    width: int
    prefix: int = 0

    @property
    def tokens(self) -> int:
        """P + H*W."""
        return self.prefix + self.height * self.width


def _is_whole(side: object) -> bool:
    return isinstance(side, Integral) and int(side) >= 0


def _new_grid(cls: type[Grid], height: int, width: int, prefix: int = 0) -> Grid:
    if not traced():
        for side in (height, width, prefix):
            # torch's pytrees put things of their own into named tuples: what is no number is refused by a layer.
            if side < 0 if type(side) is int else isinstance(side, Number) and not _is_whole(side):
                raise LinsightError(f"Grid({height}, {width}, {prefix}): these are whole numbers, 0 or more")
    return tuple.__new__(cls, (height, width, prefix))


Grid.__new__ = _new_grid  # type: ignore[method-assign,assignment]  # a named tuple may not define its own


@dataclasses.dataclass(frozen=True)
class Layout:
    """The canvas of a batch, and what part of it each image fills.

    grid: the canvas, a whole image or one window; of a packed batch, the smallest one that every image fits in.
    sizes: `(B, 2)` integers, each image's own height and width in tokens, when the batch is padded
        to the canvas at the bottom and right; None when every image fills it.
    cu_seqlens, grids: a packed batch, made by `Layout.packed`: `(images + 1,)` offsets into one sequence, and
        the grid of each image, whose prefix tokens are in front of it.
    """

    grid: Grid
    sizes: Tensor | None = None
    cu_seqlens: Tensor | None = None
    grids: tuple[Grid, ...] = ()

    @classmethod
    def packed(cls, grids: Sequence[Grid | tuple[int, int]], device: torch.device | str | None = None) -> "Layout":
        """The layout of images with these `grids`, one behind the other in one sequence `(1, sum of N_i, C)`.

        The offsets are on `device`; all here that computes goes by `grids`.
        """
        if not grids:
            raise LinsightError("a packed batch needs the grid of at least one image")
        own = tuple(Grid(*grid) for grid in grids)
        canvas = Grid(*map(max, zip(*own, strict=True)))
        return cls(canvas, None, torch.tensor(_offsets(own), dtype=torch.int32, device=device), own)

    @property
    def is_packed(self) -> bool:
        """True where images lie one behind the other in one sequence."""
        return self.cu_seqlens is not None or bool(self.grids)

    @property
    def prefix(self) -> int:
        """The most prefix tokens that an image has."""
        return max(grid.prefix for grid in (self.grids or (self.grid,)))

    def keep(self, device: torch.device) -> Tensor | None:
        """A mask `(B, N)`, False where a token is padding; None when there is none."""
        if self.sizes is None:
            return None
        sizes = self.sizes.to(device)
        grid = self.grid
        rows = torch.arange(grid.height, device=device) < sizes[:, :1]  # (B, H)
        columns = torch.arange(grid.width, device=device) < sizes[:, 1:]  # (B, W)
        inside = (rows[:, :, None] & columns[:, None, :]).flatten(1)  # (B, H*W)
        return torch.cat([inside.new_ones(inside.shape[0], grid.prefix), inside], dim=1)


LayoutLike: TypeAlias = Grid | Layout | tuple[int, int]


def as_layout(layout: LayoutLike) -> Layout:
    """The layout of a bare grid, or of a bare height and width: every image fills it.

    Raises:
        LinsightError: it is none of these.
    """
    if isinstance(layout, Layout):
        return layout
    if isinstance(layout, Grid):
        return Layout(layout)
    if not isinstance(layout, tuple | list) or len(layout) not in (2, 3):
        raise LinsightError(f"{layout!r:.40} is no layout: pass Grid(height, width), with prefix= for a class token")
    return Layout(Grid(*layout))


def check_tokens(x: Tensor, layout: Layout, name: str = "x") -> None:
    """Raise a LinsightError unless `x` `(B, N, C)` has one token for each place of `layout`."""
    if traced():
        return
    if layout.is_packed:
        return _check_packed(x, layout, name)
    grid = layout.grid
    if x.ndim != 3 or x.shape[1] != grid.tokens:
        raise LinsightError(
            f"{name} has shape {tuple(x.shape)}, but a grid of {grid.height}x{grid.width} with "
            f"{grid.prefix} prefix tokens needs (batch, {grid.tokens}, channels): "
            f"pass the layout of these tokens, Grid(height, width, prefix)"
        )


def _offsets(grids: Sequence[Grid]) -> list[int]:
    return list(accumulate((grid.tokens for grid in grids), initial=0))


def _check_packed(x: Tensor, layout: Layout, name: str) -> None:
    offsets, given = _offsets(layout.grids), layout.cu_seqlens
    if layout.sizes is not None:
        raise LinsightError("a batch is padded (sizes) or packed (cu_seqlens, grids), not both")
    # Offsets on another device are only counted: to read them would be to wait for it.
    if given is not None and (
        given.shape != (len(offsets),) or (given.device.type == "cpu" and given.tolist() != offsets)
    ):
        said = given.tolist() if given.device.type == "cpu" and given.numel() < 9 else f"of shape {tuple(given.shape)}"
        raise LinsightError(
            f"cu_seqlens {said} are not the offsets of {len(layout.grids)} grids with {offsets[-1]} tokens: "
            f"make the layout by Layout.packed(grids)"
        )
    if x.ndim != 3 or x.shape[:2] != (1, offsets[-1]):
        raise LinsightError(
            f"{name} has shape {tuple(x.shape)}, but the {len(layout.grids)} packed images have {offsets[-1]} tokens: "
            f"it must be (1, {offsets[-1]}, channels)"
        )


@dataclasses.dataclass(frozen=True)
class Tile:
    """A rectangle of a grid, with `halo` further tokens on each side as far as the grid reaches.

    The prefix tokens ride with the tile at the origin, and with no other. `sizes` `(B, 2)` is each image's
    own height and width, where the batch is padded to the grid.

        +-----------------------+
        |grid  . . . . .        |     . halo: seen, neither absorbed nor written
        |      .+-----+.        |
        |      .|tile |.        |
        |      .+-----+.        |
        |      . . . . .        |
        +-----------------------+
    """

    grid: Grid
    top: int
    left: int
    height: int
    width: int
    halo: int = 0
    sizes: Tensor | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def whole(cls, grid: Grid, sizes: Tensor | None = None) -> "Tile":
        """The tile that is all of `grid`: the dense case."""
        return cls(grid, 0, 0, grid.height, grid.width, sizes=sizes)

    @property
    def is_whole(self) -> bool:
        """True for `Tile.whole(grid)`, whose tokens need no slicing."""
        return self.halo == 0 and self.height == self.grid.height and self.width == self.grid.width

    @property
    def prefix(self) -> int:
        """Prefix tokens in this tile's sequence."""
        return self.grid.prefix if self.top == 0 and self.left == 0 else 0

    @property
    def rows(self) -> tuple[int, int]:
        """First row and one past the last, halo included."""
        if self.halo == 0:
            return self.top, self.top + self.height
        return max(0, self.top - self.halo), min(self.grid.height, self.top + self.height + self.halo)

    @property
    def columns(self) -> tuple[int, int]:
        """First column and one past the last, halo included."""
        if self.halo == 0:
            return self.left, self.left + self.width
        return max(0, self.left - self.halo), min(self.grid.width, self.left + self.width + self.halo)

    @property
    def seen(self) -> tuple[int, int]:
        """Height and width with the halo: `prefix + height * width` tokens arrive."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def take(self, x: Tensor) -> Tensor:
        """The tokens of this tile, halo included, out of the whole sequence `(B, P + H*W, ...)`."""
        if self.is_whole:
            return x
        return torch.cat([x[:, : self.prefix], self.take_grid(x[:, self.grid.prefix :])], dim=1)

    def take_grid(self, x: Tensor) -> Tensor:
        """`take` out of a sequence `(B, H*W, ...)` without prefix tokens."""
        if self.is_whole:
            return x
        (top, bottom), (left, right) = self.rows, self.columns
        return unflatten(x, 1, (self.grid.height, self.grid.width))[:, top:bottom, left:right].flatten(1, 2)

    def put(self, whole: Tensor, x: Tensor) -> None:
        """Write `x` `(B, prefix + height*width, ...)`, the tile's own tokens, to their place in the whole sequence."""
        whole[:, : self.prefix] = x[:, : self.prefix]
        canvas = unflatten(whole[:, self.grid.prefix :], 1, (self.grid.height, self.grid.width))
        rows, columns = slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)
        canvas[:, rows, columns] = unflatten(x[:, self.prefix :], 1, (self.height, self.width))

    def inner(self, x: Tensor) -> Tensor:
        """The tile's own tokens `(B, prefix + height*width, ...)` out of those with the halo."""
        if self.halo == 0:
            return x
        return torch.cat([x[:, : self.prefix], self.inner_grid(x[:, self.prefix :])], dim=1)

    def inner_grid(self, x: Tensor) -> Tensor:
        """`inner` out of a sequence without prefix tokens."""
        if self.halo == 0:
            return x
        top, left = self.top - self.rows[0], self.left - self.columns[0]
        return unflatten(x, 1, self.seen)[:, top : top + self.height, left : left + self.width].flatten(1, 2)


def pad_prefix(x: Tensor, prefix: int) -> Tensor:
    """`x` `(B, n, C)` of grid tokens with zeros for `prefix` tokens in front: `(B, prefix + n, C)`."""
    return F.pad(x, (0, 0, prefix, 0)) if prefix else x


def tiles(grid: Grid, height: int, width: int, halo: int = 0) -> list[Tile]:
    """`grid` cut into tiles of at most `height * width`, row by row; the last ones may be smaller."""
    return [
        Tile(grid, top, left, min(height, grid.height - top), min(width, grid.width - left), halo)
        for top in range(0, grid.height, height)
        for left in range(0, grid.width, width)
    ]
