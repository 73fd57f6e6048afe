"""Using a trained model: scores on a data set, classes of single images."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from linsight.errors import LinsightError

from ._data import open_data, open_evaluation
from ._device import pick_device, pick_dtype
from ._evaluate import probabilities, score
from ._feeds import default_workers, refuse
from ._images import Batch, Normalise, Samples, eval_transform, loader
from ._model import Trained, image_size
from ._random import Batches
from ._recipe import Recipe, parse
from ._run import CONFIG
from ._sources import images_under

_DATA = ("data", "data_dir", "train_split", "val_split", "val_fraction", "image_key", "label_key")


def evaluate(
    trained: Trained,
    *,
    data: str | None = None,
    split: str | None = None,
    batch_size: int = 128,
    device: str = "auto",
    amp: str = "auto",
    workers: int | None = None,
    on_bad_image: str = "skip",
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 in percent, loss and speed on `data`, by default on what the run was evaluated on.

    Raises:
        LinsightError: no such data, classes that the model does not know, or a bad image where those are refused.
    """
    given = prepare(trained, data, split, batch_size, device, amp, workers, on_bad_image, data_dir)
    recipe = given.recipe
    started = time.perf_counter()
    scores = score(given.model, given.feed, given.normalise, given.dtype, lambda batch: refuse(recipe, batch.bad))
    seconds = time.perf_counter() - started
    return {
        "data": recipe.data,
        "images": scores.images,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "skipped": len(scores.bad),
        "bad": scores.bad,
        "images_per_second": round(scores.images / seconds, 1),
        "device": str(given.normalise.device),
        "precision": given.precision,
    }


class Evaluation(NamedTuple):
    """A model on its device, and the images to evaluate it on."""

    recipe: Recipe
    model: nn.Module
    feed: Iterable[Batch]
    normalise: Normalise
    dtype: torch.dtype | None
    precision: str


def prepare(
    trained: Trained,
    data: str | None,
    split: str | None,
    batch_size: int,
    device: str,
    amp: str,
    workers: int | None,
    on_bad_image: str,
    data_dir: str | None,
) -> Evaluation:
    """Get ready to evaluate on `data`, by default on what the run was evaluated on."""
    recipe = trained.recipe
    config = trained.path.parent / CONFIG
    if data is not None:
        recipe = dataclasses.replace(recipe, data=data, data_dir=data_dir)
    elif trained.run and config.exists():
        kept = json.loads(config.read_text(encoding="utf-8"))["recipe"]
        recipe = dataclasses.replace(recipe, **{name: parse(name, kept[name]) for name in _DATA})
    else:
        raise LinsightError(f"'{trained.path}' is not in a run folder: say what to evaluate on with --data")
    if data is None and split is None:  # the very images, held out or not, that the run was evaluated on
        source = open_data(recipe).val
    else:
        source = open_evaluation(recipe, split, trained.classes, in_order=not trained.run)
    recipe = dataclasses.replace(recipe, on_bad_image=on_bad_image)
    where = pick_device(device)
    dtype, precision = pick_dtype(amp, where)
    model = trained.model.to(where)
    samples = Samples(source, eval_transform(recipe, image_size(recipe, model)), recipe.in_chans, 0)
    batches = Batches(len(source), batch_size, shuffle=False)
    count = min(default_workers() if workers is None else workers, len(batches))
    feed = loader(samples, batches, workers=count, pin=where.type == "cuda")
    return Evaluation(recipe, model, feed, Normalise(recipe, where), dtype, precision)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image file, best first, with their probabilities."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    trained: Trained,
    paths: Sequence[str | pathlib.Path],
    *,
    top: int = 5,
    batch_size: int = 64,
    device: str = "auto",
    amp: str = "auto",
    on_bad_image: str = "skip",
) -> tuple[list[Prediction], list[str]]:
    """Predictions for image files and for all images in folders; and a line for each that could not be read.

    Raises:
        LinsightError: a path that does not exist, a folder without images, no readable image at all, or a
            bad image where those are refused.
    """
    files: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise LinsightError(f"no such image or folder: '{path}'")
        found = images_under(path) if path.is_dir() else [path]
        if not found:
            raise LinsightError(f"no image in the folder '{path}'")
        files += found
    recipe = dataclasses.replace(trained.recipe, on_bad_image=on_bad_image)
    where = pick_device(device)
    dtype, _ = pick_dtype(amp, where)
    model = trained.model.to(where)
    source = _Files(files, trained.classes)
    samples = Samples(source, eval_transform(recipe, image_size(recipe, model)), recipe.in_chans, 0)
    normalise = Normalise(recipe, where)
    done: list[Prediction] = []
    bad: list[str] = []
    for batch in loader(samples, Batches(len(files), batch_size, shuffle=False), workers=0, pin=False):
        bad += batch.bad
        refuse(recipe, batch.bad)
        if not len(batch.images):
            continue
        best = probabilities(model, batch.images, normalise, dtype).sort(descending=True)
        for target, values, indices in zip(batch.targets.tolist(), *best, strict=True):
            done.append(likeliest(trained, files[target], values, indices, top))
    if not done:
        raise LinsightError(f"no image could be read: {bad[0]}")
    return done, bad


def likeliest(trained: Trained, file: pathlib.Path, values: Tensor, indices: Tensor, top: int) -> Prediction:
    """The first `top` of the probabilities `values`, best first, of the classes `indices`."""
    names = dict(enumerate(trained.titles or trained.classes))
    top = min(top, len(names))
    classes = tuple(names.get(index, str(index)) for index in indices[:top].tolist())
    return Prediction(str(file), classes, tuple(values[:top].tolist()))


class _Files:
    """Image files as a source, whose targets are their own indices."""

    def __init__(self, files: Sequence[pathlib.Path], classes: tuple[str, ...]) -> None:
        self.files, self.classes, self.targets = files, classes, list(range(len(files)))

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int, mode: str) -> Image.Image:
        with Image.open(self.files[index]) as image:
            return image.convert(mode)

    def name(self, index: int) -> str:
        return str(self.files[index])
