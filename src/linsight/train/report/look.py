"""One pass of a trained classifier over the images that it is evaluated on: what it sees, and its worst mistakes."""

import base64
import copy
import dataclasses
import io
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from linsight.data.images import Batch, Normalise, Samples, loader
from linsight.data.random import Batches
from linsight.data.sources import Source
from linsight.errors import LinsightError
from linsight.runtime.finite import require_finite

from ..evaluation import probabilities

MISTAKES, _SIDE = 20, 112  # pictures on the page, and pixels of the longer side of one


class Mistake(NamedTuple):
    """An image that a model takes for another class.

    picture: a PNG, in base64.  truth, guess: indices of classes.  sure: probability of the guess.  file: its name.
    """

    picture: str
    truth: int
    guess: int
    sure: float
    file: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The guesses of a model on `N` images.

    classes: their names.  truths, guesses: `(N,)` indices of classes; a model may have more outputs than classes.
    sure: `(N,)` probability of each guess.  mistakes: those that the model is surest of, the worst first.
    """

    classes: tuple[str, ...]
    truths: np.ndarray
    guesses: np.ndarray
    sure: np.ndarray
    mistakes: tuple[Mistake, ...]

    def counts(self) -> np.ndarray:
        """How often images of each class (rows) are taken for each (columns), `(K, K)`."""
        many = len(self.classes)
        known = self.guesses < many
        pairs = self.truths[known] * many + self.guesses[known]
        return np.bincount(pairs, minlength=many * many).reshape(many, many)

    def name(self, index: int) -> str:
        """The name of a class, or the number of an output that is none."""
        return self.classes[index] if index < len(self.classes) else f"output {index}"


def numbered(samples: Samples, batch_size: int, workers: int, pin: bool = False) -> Iterable[Batch]:
    """All of `samples` once and in order, each with its index in place of its class."""
    source = copy.copy(samples.source)
    source.targets = list(range(len(source)))
    samples = copy.copy(samples)
    samples.source = source
    batches = Batches(len(samples), batch_size, shuffle=False)
    return loader(samples, batches, workers=min(workers, len(batches)), pin=pin)


def look(
    model: nn.Module,
    batches: Iterable[Batch],
    source: Source,
    normalise: Normalise,
    dtype: torch.dtype | None,
    after_batch: Callable[[Batch], None] = lambda batch: None,
) -> Outcome:
    """The guesses of `model` for the images of `source`, of which `batches` are the `numbered` ones.

    Raises:
        LinsightError: no image can be read, or the model gives what is no number.
    """
    truth = torch.tensor(source.targets)
    truths, guesses, sure = [], [], []
    worst: list[tuple[float, int, int, Tensor]] = []
    bad = "there is none"
    for batch in batches:
        if len(batch.targets):
            shares = probabilities(model, batch.images, normalise, dtype)
            best = require_finite(shares, "images to evaluate on").max(-1)
            truths.append(truth[batch.targets])
            guesses.append(best.indices)
            sure.append(best.values)
            wrong = (best.indices != truths[-1]).nonzero()[:, 0].tolist()
            worst += [
                (-float(best.values[i]), int(batch.targets[i]), int(best.indices[i]), batch.images[i].clone())
                for i in wrong
            ]
            worst = sorted(worst, key=lambda entry: entry[:2])[:MISTAKES]
        bad = next(iter(batch.bad), bad)
        after_batch(batch)
    if not truths:
        raise LinsightError(f"no image could be read: {bad}")
    mistakes = (
        Mistake(_picture(image), int(truth[index]), guess, -less, source.name(index))
        for less, index, guess, image in worst
    )
    found = [torch.cat(parts).numpy() for parts in (truths, guesses, sure)]
    return Outcome(tuple(source.classes), found[0], found[1], found[2], tuple(mistakes))


def _picture(image: Tensor) -> str:
    """uint8 `(C, H, W)` as a small PNG, in base64."""
    picture = to_pil_image(image[: 1 if len(image) < 3 else 3])
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
