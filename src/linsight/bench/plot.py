"""Time of an image against size, one line a mechanism, with the places where it passes softmax."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linsight.runtime.figures import Label, drawing, label_lines, new_figure, save_figure
from linsight.runtime.text import printable

from ._curves import Curve, at, crossings
from .rows import Row
from .steps import STEPS


def write_plot(path: Path, rows: Sequence[Row], title: str = "") -> None:
    """A picture of the kind that the suffix of `path` says."""
    with drawing():
        save_figure(draw(rows, title), path)


def svg(rows: Sequence[Row], title: str = "") -> str:
    """An SVG element to stand in a page: no address in it, and text as text."""
    from matplotlib import rc_context

    text = io.StringIO()
    with drawing(), rc_context({"svg.fonttype": "none", "svg.hashsalt": "linsight"}):
        draw(rows, title).savefig(text, format="svg")
    element = text.getvalue().partition("<svg")[2]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return "<svg" + re.sub(r' xmlns(:\w+)?="[^"]*"', "", element)


@drawing()
def draw(rows: Sequence[Row], title: str = "") -> Any:
    """A figure with a picture for each step that was measured."""
    steps = [step for step in STEPS if any(row.get(f"{step}_step_time") for row in rows)]
    figure = new_figure(7.4 * max(len(steps), 1), 5)
    for axes, step in zip(figure.subplots(1, len(steps), squeeze=False)[0] if steps else (), steps, strict=True):
        _draw_step(axes, [row for row in rows if row.get(f"{step}_step_time")], step)
    if title:
        figure.suptitle(printable(title), fontsize=9)
    return figure


def _draw_step(axes: Any, rows: Sequence[Row], step: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    beside = {row["beside"] for row in rows}
    labels: dict[float, str] = {}
    ends: list[Label] = []
    for place, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = sorted((row for row in rows if row["model"] == name), key=_size)
        batch = [float(row[f"{step}_batch_size"]) for row in own]
        times, low, high = (
            {_size(row): float(row[f"{step}_step_time{end}"]) / b for row, b in zip(own, batch, strict=True)}
            for end in ("", "_min", "_max")
        )
        style = {"color": f"C{place % 10}", "linestyle": ("-", ":")[place // 10 % 2]}
        if name in beside:
            style = {"color": "black", "linestyle": "--"}
        axes.plot(times.keys(), times.values(), marker=".", **style)
        axes.fill_between(list(times), list(low.values()), list(high.values()), color=style["color"], alpha=0.12, lw=0)
        ratio = {_size(row): float(row[f"{step}_ratio"]) for row in own if row.get(f"{step}_ratio")}
        for size, _ in crossings(ratio):
            if found := at(times, size):
                axes.plot(size, found.value, "X", color=style["color"], markersize=8)
        ends.append(Label(*list(times.items())[-1], ": ".join([name, *_passing(own[0], ratio)]), style["color"]))
        labels |= {_size(row): _label(row, step) for row in own}
    axes.set(xscale="log", yscale="log", title=STEPS[step], ylabel="ms an image")
    axes.set_xticks(list(labels), labels.values())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{'tokens' if rows[0]['kind'] == 'operator' else 'image, pixels'} (X: a time ratio of 1)")
    axes.grid(alpha=0.3)
    label_lines(axes, ends)


def _size(row: Row) -> float:
    """The number that a row is drawn over: the tokens of an operator, the pixels of an image."""
    if row["kind"] == "operator":
        return float(row["tokens"])
    known = next(str(row[f"{step}_img_size"]) for step in STEPS if row.get(f"{step}_img_size"))
    height, _, width = known.partition("x")
    return float(int(height) * int(width or height))


def _label(row: Row, step: str) -> str:
    size = str(row[f"{step}_img_size"])
    if row["kind"] == "operator":
        return f"{float(row['tokens']):,.0f}\n{size if 'x' in size else f'{size}x{size}'}"
    return size


def _passing(row: Row, ratio: Curve) -> list[str]:
    """Where the thing of `row` is quicker than what stands beside it, if something does."""
    places = [f"{'from' if quicker else 'up to'} {_place(row, size)}" for size, quicker in crossings(ratio)]
    if ratio and not places:
        places = ["at every size" if max(ratio.values()) < 1 else "at no size"]
    return ["quicker " + ", ".join(places)] if places else []


def _place(row: Row, size: float) -> str:
    return f"{size:,.0f} tokens" if row["kind"] == "operator" else f"{math.sqrt(size):,.0f} pixels a side"
