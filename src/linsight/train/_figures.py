"""The pictures of a run, drawn without a display."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from linsight.runtime.figures import new_figure, save_figure


def curves(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """Loss and accuracy by epoch."""
    figure = new_figure(8, 3.2)
    epochs = [row["epoch"] for row in rows]
    left, right = figure.subplots(1, 2)
    for key, label in (("train_loss", "training"), ("val_loss", "evaluation")):
        left.plot(epochs, [row[key] for row in rows], marker=".", label=label)
    for key, label in (("top1", "top-1"), ("top5", "top-5")):
        right.plot(epochs, [row[key] for row in rows], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel="%")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def predictions(path: pathlib.Path, images: Any, guesses: Sequence[str], truths: Sequence[str]) -> None:
    """A grid of uint8 images `(B, C, H, W)` with the predicted class, and the true one where that is wrong."""
    columns = 8
    rows = -(-len(images) // columns)
    figure = new_figure(1.4 * columns, 1.75 * rows)
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, guess, truth in zip(grid, images, guesses, truths, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy().squeeze(), cmap="gray" if len(image) == 1 else None)
        wrong = guess != truth
        axes.set_title(
            f"{guess}\nnot {truth}" if wrong else guess, fontsize=9, color="tab:red" if wrong else "black", wrap=True
        )
    figure.suptitle("what the model says of images it was not trained on (red: wrong)", fontsize=10)
    save_figure(figure, path)


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
    for row, x, y in zip(found["exits"], *points(found["exits"]), strict=True):
        axes.annotate(row["setting"], (x, y), xytext=(0, 7), textcoords="offset points", ha="center")
    if found["chosen"]:
        axes.axvline(scale * found["budget"], color="grey", linestyle=":", label="budget")
        axes.plot(*points([found["chosen"]]), "*", markersize=14, label="chosen")
    axes.margins(0.08, 0.12)
    axes.set(xlabel=f"mean multiply-adds of an image, {unit}", ylabel="top-1, %", title=found["model"])
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
