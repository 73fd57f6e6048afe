"""The guesses of a classifier on some images, as a picture."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from linsight.runtime.figures import drawing, new_figure, save_figure
from linsight.runtime.text import folded

_COLUMNS, _ROWS = 8, 3
_LOOKED_AT = 240  # images among which errors are looked for


class Guess(NamedTuple):
    """An image of uint8 `(C, H, W)`, the class that a model gives it with that one's probability, and the true one."""

    image: Tensor
    guess: str
    sure: float
    truth: str

    @property
    def wrong(self) -> bool:
        """True where the guess is another class."""
        return self.guess != self.truth


def guesses(
    samples: Dataset[Any],
    classes: Sequence[str],
    probabilities: Callable[[Tensor], Tensor],
) -> list[Guess]:
    """The guesses of a model on images spread over `samples`, which may have others than classes to name.

    probabilities: of uint8 images `(B, C, H, W)`, `(B, classes)`.
    """
    total = len(samples)  # type: ignore[arg-type]
    count = min(_LOOKED_AT, total)
    items = [samples[0, index * total // count] for index in range(count)]
    good = [item for item in items if not isinstance(item, str)]
    found: list[Guess] = []
    for start in range(0, len(good), 64):
        part = good[start : start + 64]
        best = probabilities(torch.stack([image for image, *_ in part])).max(-1)
        names = [classes[i] if i < len(classes) else str(i) for i in best.indices.tolist()]
        for (image, target, *_), name, sure in zip(part, names, best.values.tolist(), strict=True):
            found.append(Guess(image, name, sure, classes[target]))
    return found


@drawing()
def predictions(path: pathlib.Path, found: Sequence[Guess]) -> None:
    """A grid of images with the guessed class and how sure it is: wrong ones first, of these the surest."""
    wrong = sorted((entry for entry in found if entry.wrong), key=lambda entry: -entry.sure)
    right = [entry for entry in found if not entry.wrong]
    room = _COLUMNS * _ROWS
    shown = wrong[: room - min(len(right), _COLUMNS)]  # a row of right ones at least, where there are any
    spread = min(room - len(shown), len(right))
    shown += [right[index * len(right) // spread] for index in range(spread)]
    columns = min(_COLUMNS, max(len(shown), 4))
    rows = -(-len(shown) // columns)
    figure = new_figure(1.6 * columns, 0.4 + 2.15 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, entry in zip(grid, shown, strict=False):
        axes.imshow(entry.image[:3].permute(1, 2, 0).numpy().squeeze(), cmap="gray" if len(entry.image) == 1 else None)
        lines = [*folded(f"{entry.guess}, {100 * entry.sure:.0f}\N{NO-BREAK SPACE}%", 18, 2)]
        if entry.wrong:
            lines += folded(f"true: {entry.truth}", 18, 2)
        axes.set_title("\n".join(lines), fontsize=8, color="tab:red" if entry.wrong else "black")
    said = f"wrong (red, the surest first): {len(wrong)} of {len(found)} images that it was not trained on"
    figure.suptitle(said, fontsize=10)
    save_figure(figure, path)
