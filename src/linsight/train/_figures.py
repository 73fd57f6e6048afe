"""The pictures of a run, drawn without a display."""

import pathlib
from collections.abc import Sequence
from typing import Any

from linsight.runtime.figures import Label, drawing, label_points, new_figure, save_figure
from linsight.runtime.text import printable
from linsight.tasks import Column


@drawing()
def curves(path: pathlib.Path, rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> None:
    """Loss by epoch, beside the measures of `columns`: those of the unit of the first."""
    figure = new_figure(8, 3.2)
    epochs = [row["epoch"] for row in rows]
    left, right = figure.subplots(1, 2)
    for key, label in (("train_loss", "training"), ("val_loss", "evaluation")):
        if key in rows[0]:
            left.plot(epochs, [row[key] for row in rows], marker=".", label=label)
    unit = columns[0].unit
    for column in columns:
        if column.unit == unit:
            right.plot(epochs, [row[column.key] for row in rows], marker=".", label=column.label)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel=unit)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


@drawing()
def exits(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Accuracy against mean multiply-adds, as `evaluate_exits` found them: of all settings, and of each exit alone."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    unit, scale = ("M", 1e3) if found["exits"][-1]["gmacs"] < 0.1 else ("G", 1.0)

    def points(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
        return [[scale * row["gmacs"] for row in rows], [row["top1"] for row in rows]]

    rows = sorted(found["settings"], key=lambda row: row["gmacs"])
    axes.plot(*points(rows), marker=".", label="leaving when sure")
    axes.plot(*points(found["exits"]), "s", label="all at one exit")
    if found["chosen"]:
        axes.axvline(scale * found["budget"], color="grey", linestyle=":", label="budget")
        axes.plot(*points([found["chosen"]]), "*", markersize=14, label="chosen")
    axes.margins(0.08, 0.12)
    axes.set(xlabel=f"mean multiply-adds of an image, {unit}", ylabel="top-1, %", title=printable(found["model"]))
    axes.grid(alpha=0.3)
    axes.legend()
    places = zip(found["exits"], *points(found["exits"]), strict=True)
    label_points(axes, [Label(x, y, row["setting"]) for row, x, y in places], size=9)
    save_figure(figure, path)
