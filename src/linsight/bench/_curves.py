"""Curves through measured sizes, on logarithmic axes: values between them, and where two curves cross."""

import math
from collections.abc import Mapping
from typing import NamedTuple

Curve = Mapping[float, float]  # size -> seconds, or a ratio; both positive


class Estimate(NamedTuple):
    """A value of a curve.  beyond: how many times outside the measured sizes it is; 1 within them."""

    value: float
    beyond: float = 1.0


def at(curve: Curve, size: float, slopes: tuple[float, float] = (-math.inf, math.inf)) -> Estimate | None:
    """The curve at a size: straight lines between neighbours on logarithmic axes, and on from the outermost two.

    None where nothing was measured, or a single other size.

    slopes: the least and the largest that the line has above the sizes measured, whatever the last two say.
    """
    sizes = sorted(curve)
    if size in curve:
        return Estimate(curve[size])
    if len(sizes) < 2:
        return None
    right = min(max(sum(known < size for known in sizes), 1), len(sizes) - 1)
    low, high = sizes[right - 1], sizes[right]
    share = math.log(size / low) / math.log(high / low)
    value = math.exp((1 - share) * math.log(curve[low]) + share * math.log(curve[high]))
    if size > high:
        slope = math.log(curve[high] / curve[low]) / math.log(high / low)
        value = curve[high] * (size / high) ** min(max(slope, slopes[0]), slopes[1])
    return Estimate(value, max(sizes[0] / size, size / sizes[-1], 1.0))


def crossings(ratio: Curve) -> list[tuple[float, bool]]:
    """Sizes at which a ratio of times passes 1, and whether it is smaller than 1 above: faster from there on."""
    sizes = sorted(ratio)
    levels = [math.log(ratio[size]) for size in sizes]
    found: list[tuple[float, bool]] = []
    last = 0  # the sign of the level before, zeros left out
    for i, level in enumerate(levels):
        sign = (level > 0) - (level < 0)
        if sign and last and sign != last:
            j = max(k for k in range(i) if levels[k])  # where that sign was last seen
            share = levels[j] / (levels[j] - level)
            found.append((math.exp((1 - share) * math.log(sizes[j]) + share * math.log(sizes[i])), sign < 0))
        last = sign or last
    return found


def pays_from(ratio: Curve) -> float | None:
    """The size above which the ratio stays below 1, as far as was measured: 0 where it always is, None where it is
    not at the largest size.
    """
    if not ratio or ratio[max(ratio)] >= 1:
        return None
    downs = [size for size, faster in crossings(ratio) if faster]
    return downs[-1] if downs else 0.0
