"""The image that is streamed: anything that can be sliced, normalised tile by tile."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linsight.errors import ImageError, LinsightError

from .files import first_line


class Source:
    """An image `(H, W, C)` or `(C, H, W)` (or `(H, W)`, of one channel) of which only slices are ever read.

    Whole numbers are taken as of 0 to the largest of their type, floats as they are; then `mean` is subtracted and
    `std` divided by.

    Raises:
        LinsightError: of another shape, or without one.
    """

    def __init__(self, image: Any, mean: Sequence[float], std: Sequence[float], name: str = "the image") -> None:
        channels = len(mean)
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
        self.image, self.shape, self.name = image, shape, name
        self.size: tuple[int, int] = shape[1:] if self.axes == "CHW" else shape[:2]
        if min(self.size) < 1:
            raise LinsightError(f"{name} of shape {shape} has no pixels")
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """The pixels from the first row and column to before the last, `(1, C, h, w)` float32, normalised."""
        place = (slice(*rows), slice(*columns))
        try:
            part = self.image[(slice(None), *place) if self.axes == "CHW" else place]
            pixels = part if isinstance(part, Tensor) else _tensor(part)
        except Exception as error:  # any error of the reader behind the slices
            raise self._unreadable(rows, columns, f"{type(error).__name__}: {first_line(error)}") from error
        if pixels.dtype == torch.bool or pixels.is_complex():
            raise self._unreadable(rows, columns, f"pixels of {pixels.dtype} have no brightness")
        scale = 1.0 if pixels.is_floating_point() else float(torch.iinfo(pixels.dtype).max)
        pixels = pixels.to(torch.float32) / scale
        if self.axes != "CHW":
            pixels = pixels[None] if self.axes == "HW" else pixels.permute(2, 0, 1)
        expected = (len(self.mean), rows[1] - rows[0], columns[1] - columns[0])
        if tuple(pixels.shape) != expected:
            raise self._unreadable(rows, columns, f"the reader gave {tuple(pixels.shape)} for {expected}")
        return ((pixels.to(self.mean.device) - self.mean) / self.std)[None]

    def _unreadable(self, rows: tuple[int, int], columns: tuple[int, int], why: str) -> ImageError:
        return ImageError(
            f"rows {rows[0]} to {rows[1]}, columns {columns[0]} to {columns[1]} of {self.name} cannot be read ({why}): "
            f"nothing was computed from them"
        )


def _tensor(part: Any) -> Tensor:
    """A copy of an array, which may be of any byte order and read-only."""
    return torch.from_numpy(np.array(part, dtype=np.asarray(part).dtype.newbyteorder("="), order="C"))
