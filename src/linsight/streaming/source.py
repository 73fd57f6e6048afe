"""The image that is streamed: anything that can be sliced, normalised tile by tile."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linsight.data.pictures import Picture, first_line
from linsight.data.values import SLACK, check_fill, known_white, no_number, place_of, survey, white_of
from linsight.errors import ImageError, LinsightError

_PLAIN = ((0.0,), (1.0,))


class Source:
    """An image `(H, W, C)` or `(C, H, W)` (or `(H, W)`, of one channel) of which only slices are ever read.

    Values are brought to 0 to 1 by what is white in them: 255 in uint8, 65535 in uint16, 1 in floats and in bool. Other
    whole numbers are of 0 to 255 where none is above that, else of 0 to 65535: they are looked at once. Then `mean` is
    subtracted and `std` divided by. Floats may be of any range where the mean is 0 and the deviation 1: they are
    normalised already.

    Args:
        image: an array, or a `Picture`, which knows its own white.
        mean, std: one value a channel.
        name: of the image, in messages.
        fill: the value of floats that are no number.

    Raises:
        LinsightError: of another shape, or without one; as an ImageError, values of no such range, or that are no
            number without a fill.
    """

    def __init__(
        self,
        image: Any,
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "the image",
        fill: float | None = None,
    ) -> None:
        channels = len(mean)
        check_fill(fill)
        shape: Any = tuple(int(side) for side in getattr(image, "shape", ()))
        if len(shape) == 2 and channels == 1:
            self.axes = "HW"
        elif len(shape) == 3 and channels in (shape[2], shape[0]):
            self.axes = "HWC" if shape[2] == channels else "CHW"
        else:
            raise LinsightError(
                f"{name} of shape {shape or 'unknown'} cannot be streamed: "
                f"give an array of (height, width, {channels}) or ({channels}, height, width)"
            )
        self.image, self.shape, self.name, self.fill = image, shape, name, fill
        self.size: tuple[int, int] = shape[1:] if self.axes == "CHW" else shape[:2]
        if min(self.size) < 1:
            raise LinsightError(f"{name} of shape {shape} has no pixels")
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
        self.any_range = (tuple(set(mean)), tuple(set(std))) == _PLAIN
        self.white = self._white()

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """The pixels from the first row and column to before the last, `(1, C, h, w)` float32, normalised."""
        try:
            part = self._slice(slice(*rows), slice(*columns))
            pixels = part if isinstance(part, Tensor) else _tensor(part)
        except Exception as error:  # any error of the reader behind the slices
            raise self._unreadable(rows, columns, f"{type(error).__name__}: {first_line(error)}") from error
        white = self.white or self._known(_dtype(pixels))
        if white is None:
            raise self._unreadable(rows, columns, f"pixels of {pixels.dtype}, of an image that does not tell its dtype")
        floats = pixels.is_floating_point()
        pixels = pixels.to(torch.float32)
        if self.axes != "CHW":
            pixels = pixels[None] if self.axes == "HW" else pixels.permute(2, 0, 1)
        expected = (len(self.mean), rows[1] - rows[0], columns[1] - columns[0])
        if tuple(pixels.shape) != expected:
            raise self._unreadable(rows, columns, f"the reader gave {tuple(pixels.shape)} for {expected}")
        if floats and not isinstance(self.image, Picture):
            pixels = self._checked(pixels, rows, columns)
        return (((pixels / white).to(self.mean.device) - self.mean) / self.std)[None]

    def _slice(self, rows: slice, columns: slice) -> Any:
        return self.image[(slice(None), rows, columns) if self.axes == "CHW" else (rows, columns)]

    def _white(self) -> float | None:
        """White in the image; None where it does not tell its type, so that each slice is asked."""
        if isinstance(self.image, Picture):
            return self.image.white
        dtype = getattr(self.image, "dtype", None)
        if dtype is None:
            return None
        try:
            dtype = _dtype(self.image) if isinstance(dtype, torch.dtype) else np.dtype(dtype)
        except TypeError:
            return None
        white = self._known(dtype)
        if white is not None:
            return white

        def values(rows: slice, columns: slice) -> Any:
            part = self._slice(rows, columns)
            part = part.cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
            return np.moveaxis(part, 0, -1) if self.axes == "CHW" else part

        return white_of(dtype, survey(values, self.size, self.name), self.name)

    def _known(self, dtype: np.dtype[Any]) -> float | None:
        if dtype.kind == "f":
            return 1.0
        return 1.0 if dtype.kind == "b" else known_white(dtype, self.name)

    def _checked(self, pixels: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Floats `(C, h, w)` that are numbers, or filled, and in the range that they should be in."""
        good = pixels.isfinite()
        if not good.all():
            if self.fill is None:
                there = good.permute(1, 2, 0).cpu().numpy()
                where = f" in rows {rows[0]} to {rows[1]}, columns {columns[0]} to {columns[1]}"
                count = there.size - int(there.sum())
                raise no_number(self.name, count, place_of(there, rows[0], columns[0]), where)
            pixels = pixels.where(good, self.fill)
        low, high = float(pixels.min()), float(pixels.max())
        if not self.any_range and (low < -SLACK or high > 1 + SLACK):
            raise self._unreadable(
                rows,
                columns,
                f"values of {low:g} to {high:g}, and floats are of 0 to 1: divide them first, or give mean= of 0 and "
                f"std= of 1 where they are normalised already",
            )
        return pixels

    def _unreadable(self, rows: tuple[int, int], columns: tuple[int, int], why: str) -> ImageError:
        return ImageError(
            f"rows {rows[0]} to {rows[1]}, columns {columns[0]} to {columns[1]} of {self.name} cannot be read ({why}): "
            f"nothing was computed from them"
        )


def _tensor(part: Any) -> Tensor:
    """A copy of an array, which may be of any byte order and read-only."""
    return torch.from_numpy(np.array(part, dtype=np.asarray(part).dtype.newbyteorder("="), order="C"))


def _dtype(pixels: Tensor) -> np.dtype[Any]:
    """NumPy's name of the type; bfloat16, which it lacks, is a float like others."""
    floats = pixels.is_floating_point()
    return np.dtype(np.float32 if floats else str(pixels.dtype).removeprefix("torch."))
