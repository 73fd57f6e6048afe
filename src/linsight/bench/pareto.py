"""Accuracy against time of the mechanisms of a short list, with the front of those that are worth their time."""

from pathlib import Path
from typing import Any

from linsight.runtime.figures import Label, drawing, label_points, new_figure, save_figure

from ._shortlist import Shortlist


@drawing()
def draw_pareto(found: Shortlist, title: str = "") -> Any:
    """A figure: milliseconds of an image on a logarithmic axis, top-1 with its seeds, the front as a line."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(8, 5.5)
    axes = figure.subplots()
    for pick in found.picks:
        colour = "tab:red" if pick.reason else "grey"
        time = pick.choice.milliseconds
        axes.plot([time] * len(pick.seeds), pick.seeds, ".", color=colour, alpha=0.35, markersize=4)
        axes.plot(time, pick.top1, "o", color=colour, markersize=6 if pick.reason else 4)
    front = sorted((pick.choice.milliseconds, pick.top1) for pick in found.picks if pick.reason)
    axes.plot(*zip(*front, strict=True), "-", color="tab:red", alpha=0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="milliseconds of an image", ylabel="top-1 %, mean; small dots: seeds", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.margins(0.12)
    label_points(axes, [Label(pick.choice.milliseconds, pick.top1, pick.choice.name) for pick in found.picks])
    return figure


def write_pareto(path: Path, found: Shortlist, title: str = "") -> None:
    """A picture of the kind that the suffix of `path` says."""
    save_figure(draw_pareto(found, title), path)
