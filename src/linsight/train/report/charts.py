"""Charts in SVG, in the colours of the page."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from .page import name

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 330, 210, 46, 10, 30, 34
_POINTS = 400  # of a line: a long run is thinned out
_COLOURS = 4  # of lines, in the style of the page
Points = Sequence[tuple[float, float]]


def line_chart(title: str, lines: Mapping[str, Points], *, unit: str = "", x: str = "epoch") -> Markup:
    """Lines of points `(x, y)` by their names, with the last value of each; "" where there is no point.

    unit: of the values.  x: the axis from left to right.
    """
    lines = {label: _thinned([p for p in points if all(map(math.isfinite, p))]) for label, points in lines.items()}
    lines = {label: points for label, points in lines.items() if points}
    every = [point for points in lines.values() for point in points]
    if not every:
        return Markup()
    xs, ys = _ticks([x for x, _ in every], whole=True), _ticks([y for _, y in every])
    inner = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - xs[0]) / (xs[-1] - xs[0])
        up = (point[1] - ys[0]) / (ys[-1] - ys[0])
        return round(_LEFT + across * inner[0], 1), round(_TOP + (1 - up) * inner[1], 1)

    parts = [_text(0, 12, title)]
    for value in ys:
        _, height = place((xs[0], value))
        grid = Markup('<line class="grid" x1="{0}" y1="{1}" x2="{2}" y2="{1}"/>')
        parts.append(grid.format(_LEFT, height, _WIDTH - _RIGHT))
        parts.append(_text(_LEFT - 6, height + 4, f"{value:.6g}", "end"))
    for value in xs:
        across, _ = place((value, ys[0]))
        parts.append(_text(across, _HEIGHT - _BOTTOM + 15, f"{value:.6g}", "middle"))
    parts.append(_text(_LEFT + inner[0] / 2, _HEIGHT - 4, x, "middle", "soft"))
    legend, told = Markup(), []
    for number, (label, points) in enumerate(lines.items()):
        way = " ".join(f"{'L' if index else 'M'}{a} {b}" for index, (a, b) in enumerate(map(place, points)))
        dot = " h0.1" if len(points) == 1 else ""
        path = Markup('<path class="c{}" stroke-linecap="round" d="{}{}"/>')
        parts.append(path.format(number % _COLOURS, way, dot))
        told.append(f"{label} {points[-1][1]:.4g}{unit}".strip())
        legend += Markup('<tspan class="f{}">● </tspan><tspan>{}  </tspan>').format(number % _COLOURS, told[-1])
    parts.append(Markup('<text x="{}" y="24" xml:space="preserve">{}</text>').format(_LEFT, legend))
    return _svg(_WIDTH, _HEIGHT, f"{title}: {'; '.join(told)}", parts)


def _thinned(points: Points) -> Points:
    step = -(-len(points) // _POINTS)
    return [*points[:-1:step], *points[-1:]] if points else points


def _ticks(values: Sequence[float], whole: bool = False) -> list[float]:
    """Round numbers from below the least of `values` to above the largest, three to seven of them."""
    low, high = min(values), max(values)
    spread = max(high - low, 1e-6 * abs(high)) if high > low else abs(high)
    spread = spread if spread > 1e-30 else 1.0
    exponent = math.floor(math.log10(spread / 4))
    step = next(s for s in (f * 10.0**exponent for f in (1, 2, 5, 10)) if spread / s <= 5)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step), math.ceil(high / step)
    if whole:  # an axis of epochs begins and ends with them
        between = (n * step for n in range(first + 1, last))
        return [low, *(value for value in between if min(value - low, high - value) >= step / 2), max(high, low + 1)]
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def matrix(counts: np.ndarray, names: Sequence[str]) -> Markup:
    """How often images of each class (rows) are taken for each (columns): `counts` `(K, K)` of whole numbers."""
    many = len(names)
    side = 34 if many <= 12 else max(9, 460 // many)
    edge = 8 + 6.2 * min(18, max(len(name(entry, 18)) for entry in names))
    whole = edge + side * many + 4
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    parts = []
    for index, entry in enumerate(names):
        middle = round(edge + side * (index + 0.5), 1)
        if side >= 9:
            label = name(entry, 18)
            parts.append(_text(edge - 5, middle + 4, label, "end"))
            parts.append(
                Markup('<text transform="translate({},{}) rotate(-90)">{}</text>').format(middle + 4, edge - 5, label)
            )
    for row, column in np.argwhere(counts):
        x, y = round(edge + side * int(column), 1), round(edge + side * int(row), 1)
        parts.append(
            Markup(
                '<rect class="{}" x="{}" y="{}" width="{}" height="{}" fill-opacity="{:.2f}">'
                "<title>{} taken for {}: {}</title></rect>"
            ).format(
                "cell" if row == column else "miss",
                x,
                y,
                side - 1,
                side - 1,
                0.12 + 0.78 * shares[row, column],
                name(names[row], 30),
                name(names[column], 30),
                int(counts[row, column]),
            )
        )
        if side >= 30:
            parts.append(_text(x + side / 2, y + side / 2 + 4, str(int(counts[row, column])), "middle"))
    return _svg(round(whole), round(whole), "true class by row, seen class by column", parts)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _svg(width: int, height: int, told: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">')
    return head.format(width, height, told) + Markup("\n{}\n</svg>").format(Markup("\n").join(parts))
