"""How a grid is cut into rectangles: Swin's windows, shifted or not, and CSwin's stripes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Grid
from .sizes import at_most, copied, divided, in_example, leaves, traced, unflatten


def to_multiple(side: int, size: int) -> int:
    """The least multiple of `size` that is not below `side`; in a form that stays short in a graph."""
    return (side + size - 1) // size * size


class Partition:
    """The tokens of a grid in rectangles of `sizes`, height and width; None: the whole side, as of a stripe.

    The grid is padded at the bottom and right to whole rectangles, then rolled by `shift`, so the last ones hold
    tokens from opposite rims: up to three regions a side, which do not see each other.

    always: shift a side of one rectangle, too.
    images: `(B, 2)`, each image's own height and width, where the batch is padded to the grid: a side of it that is
        within one rectangle is not shifted.
    """

    def __init__(
        self,
        grid: Grid,
        sizes: tuple[int | None, int | None],
        shift: tuple[int, int] = (0, 0),
        *,
        always: bool = False,
        images: Tensor | None = None,
    ) -> None:
        self.grid, self.images = grid, None if always else images
        height, width = (side if size is None else size for side, size in zip(grid[:2], sizes, strict=True))
        self.inner = Grid(height, width)
        self.counts = tuple(
            1 if size is None else (side + size - 1) // size for side, size in zip(grid[:2], sizes, strict=True)
        )
        # In a graph, whether there is padding or a shift must not be asked: an answer would hold for some sizes only.
        self.graph = traced(*grid)
        self.padding = tuple(
            size is not None and not (type(size) is int and size == 1) and (self.graph or side % size != 0)
            for side, size in zip(grid[:2], sizes, strict=True)
        )
        self.padded = tuple(
            count * size if padding else side
            for count, size, side, padding in zip(self.counts, self.inner[:2], grid[:2], self.padding, strict=True)
        )
        # A side of one rectangle is not shifted, by 0. Others are larger than it by a rectangle at least.
        self.shift = tuple(
            step if always or not step else at_most(side - size, step)
            for step, side, size in zip(shift, self.padded, self.inner[:2], strict=True)
        )
        self.shifted = any(type(step) is not int or step for step in self.shift)
        # Where an example has a single rectangle along a side, a graph by views would be right for such grids only.
        self.by_place = leaves() and any(type(n) is not int and in_example(n) == 1 for n in self.counts)

    def cut(self, x: Tensor) -> Tensor:
        """`(B, H*W, ...)` -> `(B * rectangles, h*w, ...)`, those of an image together."""
        if self.by_place:
            row, column, inside = self._places(x.device)
            at = row.clamp(max=self.grid.height - 1) * self.grid.width + column.clamp(max=self.grid.width - 1)
            return self._apiece(x.index_select(1, at).masked_fill(~inside.view(-1, *[1] * (x.ndim - 2)), 0))
        x = unflatten(x, 1, self.grid[:2])
        if any(self.padding):
            low, right = (padded - side for padded, side in zip(self.padded, self.grid[:2], strict=True))
            x = F.pad(x, (*[0, 0] * (x.ndim - 3), 0, right, 0, low))
        return self._cut(self._roll(x, -1))

    def join(self, x: Tensor) -> Tensor:
        """`(B * rectangles, h*w, C)` -> `(B, H*W, C)`, without the padding."""
        if self.by_place:
            each = self.inner.tokens
            x = x.reshape(-1, self.counts[0] * self.counts[1] * each, *x.shape[2:])
            pairs = divided(torch.arange(self.grid.height * self.grid.width, device=x.device), self.grid.width)
            down, across = (
                divided(divided(place + (side - step), side)[1], size)
                for place, side, step, size in zip(pairs, self.padded, self.shift, self.inner, strict=False)
            )
            rectangle, cell = (a * n + b for a, b, n in zip(down, across, (self.counts[1], self.inner[1]), strict=True))
            return x.index_select(1, rectangle * each + cell)
        x = unflatten(unflatten(x, 0, (-1, *self.counts)), 3, self.inner[:2])
        x = self._roll(x.transpose(2, 3).flatten(3, 4).flatten(1, 2), 1)
        for axis, side, padding in zip((1, 2), self.grid[:2], self.padding, strict=True):
            if padding and not self.graph:
                x = x.narrow(axis, 0, side)
            elif padding:  # not by a slice: a graph would ask whether it is all there is
                x = x.index_select(axis, torch.arange(side, device=x.device))
        return x.flatten(1, 2)

    def keep(self, x: Tensor) -> Tensor | None:
        """`(B * rectangles, h*w)` bool, False for padding, of the batch of `x`; None where there is none."""
        if not any(self.padding):
            return None
        if self.by_place:
            return self._apiece(copied(self._places(x.device)[2].expand(x.shape[0], -1)))
        rows, columns = (
            torch.arange(padded, device=x.device) < side
            for padded, side in zip(self.padded, self.grid[:2], strict=True)
        )
        inside = (rows[:, None] & columns)[None]
        if self.images is not None and self.shifted:
            return self._cut(self._roll(inside.expand(x.shape[0], -1, -1), -1))
        return self._for_all(self._cut(self._roll(inside, -1)), x)

    def regions(self, x: Tensor) -> Tensor | None:
        """`(B * rectangles, h*w)`, a number for each region of a rectangle; None without a shift."""
        if not self.shifted:
            return None
        if self.by_place:
            row, column, _ = self._places(x.device)
            region = 2 * (row < self.shift[0]).long() + (column < self.shift[1])
            return self._apiece(copied(region.expand(x.shape[0], -1)))
        region = self._regions(x.device)
        return region if self.images is not None else self._for_all(region, x)

    def apart(self, x: Tensor) -> Tensor | None:
        """`(B * rectangles, 1, h*w, h*w)`, -100 between tokens of different regions; None without a shift."""
        if not self.shifted:
            return None
        region = self._regions(x.device) if not self.by_place else self.regions(x)
        assert region is not None
        apart = -100.0 * (region[:, None, :, None] != region[:, None, None, :]).to(x.dtype)
        return apart if self.by_place or self.images is not None else self._for_all(apart, x)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of each token of each rectangle, `(rectangles * h*w,)`, and whether it is on the grid."""
        count = self.counts[0] * self.counts[1]
        rectangle, cell = divided(torch.arange(count * self.inner.tokens, device=device), self.inner.tokens)
        corners, cells = divided(rectangle, self.counts[1]), divided(cell, self.inner.width)
        row, column = (
            divided(corner * size + place + step, side)[1]
            for corner, size, place, step, side in zip(
                corners, self.inner, cells, self.shift, self.padded, strict=False
            )
        )
        return row, column, (row < self.grid.height) & (column < self.grid.width)

    def _apiece(self, x: Tensor) -> Tensor:
        """`(B, rectangles * h*w, ...)` -> `(B * rectangles, h*w, ...)`, without an axis of rectangles alone."""
        return x.reshape(-1, self.inner.tokens, *x.shape[2:])

    def _regions(self, device: torch.device) -> Tensor:
        """Regions in the rectangles of one image, or, where images have sizes of their own, of all."""
        sides = []
        for axis, (padded, size, shift) in enumerate(zip(self.padded, self.inner[:2], self.shift, strict=True)):
            place = torch.arange(padded, device=device)
            rolled = (place >= padded - shift)[None]
            if self.images is not None:
                rolled = rolled & self._moved(axis, device)[:, None]
            sides.append((place >= padded - size).long() + rolled)
        return self._cut(3 * sides[0][:, :, None] + sides[1][:, None])

    def _for_all(self, x: Tensor, batch: Tensor) -> Tensor:
        """Numbers of the rectangles of one image, for each of a batch."""
        return copied(x.expand(batch.shape[0], *x.shape)).flatten(0, 1)

    def _moved(self, axis: int, device: torch.device) -> Tensor:
        """`(B,)` bool, True for images that are shifted along a side."""
        assert self.images is not None
        return self.images[:, axis].to(device) > self.inner[axis]

    def _roll(self, x: Tensor, sign: int) -> Tensor:
        if not self.shifted:
            return x
        if self.images is None and all(type(step) is int for step in self.shift):
            return x.roll([sign * step for step in self.shift], (1, 2))
        for axis, side, step in zip((1, 2), self.padded, self.shift, strict=True):
            if type(step) is int and not step:
                continue
            _, places = divided(torch.arange(side, device=x.device) + (side - sign * step), side)
            rolled = x.index_select(axis, places)
            if self.images is not None:
                rolled = torch.where(self._moved(axis - 1, x.device).view(-1, *[1] * (x.ndim - 1)), rolled, x)
            x = rolled
        return x

    def _cut(self, x: Tensor) -> Tensor:
        (rows, columns), (h, w) = self.counts, self.inner[:2]
        x = unflatten(unflatten(x, 2, (columns, w)), 1, (rows, h))  # (B, rows, h, columns, w, ...)
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def within(window: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """A window that is not larger than the grid."""
    return at_most(grid[0], window[0]), at_most(grid[1], window[1])


def half_shift(window: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Half a window, along a side that has more than one."""
    rows, columns = (size // 2 if side > size else 0 for size, side in zip(window, grid, strict=True))
    return rows, columns
