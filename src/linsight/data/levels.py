"""Levels of a picture that is kept at several sizes, and the one of a wanted magnification."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from linsight.errors import LinsightError

_NEAR = math.sqrt(2)  # how far a level may be from what is asked for: half a step of a pyramid of halves


class Level(NamedTuple):
    """Height and width in pixels, and microns a pixel where the file says them."""

    height: int
    width: int
    mpp: float | None

    def __str__(self) -> str:
        return f"{self.width} x {self.height}" + (f" at {self.mpp:.4g} microns a pixel" if self.mpp else "")


def levels_of(sizes: Sequence[tuple[int, int]], mpp: float | None) -> list[Level]:
    """The levels of these heights and widths, of which the first has `mpp` microns a pixel."""
    widest = sizes[0][1]
    return [Level(height, width, mpp and mpp * widest / width) for height, width in sizes]


def choose(levels: Sequence[Level], level: int | None, mpp: float | None, name: str) -> int:
    """The number of the level asked for by its number, or by microns a pixel; the first, of full size, by neither.

    Raises:
        LinsightError: both are given, there is no such level, or the picture does not say its microns a pixel.
    """
    known = "; ".join(f"{number}: {entry}" for number, entry in enumerate(levels))
    if level is not None and mpp is not None:
        raise LinsightError(f"level={level} and mpp={mpp:g} both choose a level: give one of them")
    if level is not None and not 0 <= level < len(levels):
        raise LinsightError(f"{name} has no level {level}; it has {known}")
    if mpp is None:
        return level or 0
    if not (mpp > 0 and math.isfinite(mpp)):
        raise LinsightError(f"mpp={mpp:g}: give microns a pixel, more than 0")
    if levels[0].mpp is None:
        raise LinsightError(f"{name} does not say its microns a pixel: choose by level; it has {known}")
    distances = [abs(math.log(mpp / entry.mpp)) if entry.mpp else math.inf for entry in levels]
    nearest = min(range(len(levels)), key=distances.__getitem__)
    if distances[nearest] > math.log(_NEAR) + 1e-6:
        raise LinsightError(f"{name} has no level near {mpp:g} microns a pixel; it has {known}")
    return nearest
