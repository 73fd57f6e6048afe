"""Values of pixels: what is white in each type of number, and pixels that are no number."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from linsight.errors import ImageError, LinsightError

_WHITE = {"b1": 1.0, "u1": 255.0, "u2": 65535.0}
SLACK = 0.5 / 255  # half a level of 8 bits: rounding, where values were computed
_BAND = 2**24  # values that are looked at together


class Extent(NamedTuple):
    """The least and the largest of all values that are numbers; zeros where there is none."""

    low: float
    high: float


def known_white(dtype: np.dtype[Any], name: str) -> float | None:
    """White in a type whose range is the type's own; None where the values have to be looked at.

    Raises:
        ImageError: numbers that have no brightness.
    """
    if dtype.kind not in "buif" or dtype.str[1:] == "i1":
        raise ImageError(f"{name}: pixels of {dtype} have no brightness: give uint8, uint16, or floats of 0 to 1")
    return _WHITE.get(dtype.str[1:])


def white_of(dtype: np.dtype[Any], extent: Extent, name: str) -> float:
    """White in a type of many ranges, by the values of one image.

    Floats are of 0 to 1, or, where one is above 2, of 0 to 255; whole numbers, where none is above 255, of 0 to 255,
    else of 0 to 65535.

    Raises:
        ImageError: the values are in none of these ranges.
    """
    low, high = extent
    if dtype.kind == "f":
        # just above 1 is neither: 0 to 1 that was resized with overshoot, most likely
        if low >= -SLACK and (high <= 1 + SLACK or 2 <= high <= 255 * (1 + SLACK)):
            return 1.0 if high < 2 else 255.0
    elif low >= 0 and high <= 65535:
        return 255.0 if high <= 255 else 65535.0
    ranges = "0 to 1 or 0 to 255" if dtype.kind == "f" else "0 to 255 or 0 to 65535"
    raise ImageError(
        f"{name}: values of {extent.low:g} to {extent.high:g} ({dtype}), and pixels are of {ranges}: scale them first"
    )


def check_fill(fill: float | None) -> None:
    """Raise a LinsightError for a fill that is no number."""
    if fill is not None and not math.isfinite(fill):
        raise LinsightError(f"fill={fill}: give a number, in the units of the picture")


def survey(read: Callable[[slice, slice], Any], size: tuple[int, int], name: str, fill: float | None = None) -> Extent:
    """Look at all values of an image, some rows at a time.

    Args:
        read: gives the values of a rectangle of rows and columns, `(h, w)` or `(h, w, channels)`.
        size: height and width.
        fill: the value of those that are no number.

    Raises:
        ImageError: values that are no number, without a fill; the line says where and how many.
    """
    height, width = size
    low, high, missing = math.inf, -math.inf, 0
    first: tuple[int, ...] = ()
    step = max(1, _BAND // width)
    for top in range(0, height, step):
        values = read(slice(top, min(height, top + step)), slice(0, width))
        good = np.isfinite(values)
        if not good.all():
            if not missing:
                first = place_of(good, top)
            missing += good.size - int(good.sum())
            values = values[good]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if missing and fill is None:
        raise no_number(name, missing, first)
    return Extent(low, high) if low <= high else Extent(0, 0)


def place_of(good: Any, top: int = 0, left: int = 0) -> tuple[int, int, int]:
    """Row, column and channel of the first value `(h, w)` or `(h, w, channels)` that is not good."""
    row, column, *channel = np.unravel_index(int(np.argmin(good)), good.shape)
    return int(row) + top, int(column) + left, int(channel[0]) if channel else 0


def no_number(name: str, count: int, place: tuple[int, ...], where: str = "") -> ImageError:
    """The error of an image with values that are no number; `place` is the row, column and channel of the first."""
    row, column, channel = place
    values = "1 value is no number" if count == 1 else f"{count} values are no numbers"
    return ImageError(
        f"{name}: {values}{where}, the first in row {row}, column {column}, channel {channel}: "
        f"replace them by one that is (--fill 0, fill=0)"
    )


def over_white(pixels: Any, white: float, premultiplied: bool) -> Any:
    """Pixels `(h, w, colours + 1)` whose last value is their opacity, on white; in their own type."""
    colours, alpha = pixels[..., :-1], pixels[..., -1:]
    if pixels.dtype.kind == "f":
        return (colours if premultiplied else colours * (alpha / white)) + (white - alpha)
    top = int(white)
    kind = np.uint16 if top == 255 else np.uint64  # the largest product is top * top
    colours, alpha = colours.astype(kind), alpha.astype(kind)
    if premultiplied:
        return np.minimum(colours + (top - alpha), top).astype(pixels.dtype)
    return ((colours * alpha + (top * (top - alpha) + top // 2).astype(kind)) // top).astype(pixels.dtype)
