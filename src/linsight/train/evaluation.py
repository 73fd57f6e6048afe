"""Scores of a trained model on a data set, and of any model on batches of images."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.data.datasets import open_data, open_evaluation, under
from linsight.data.feeds import default_workers, refuse
from linsight.data.images import Batch, Normalise, Samples, Unprepared, eval_transform, loader, told, whole_image
from linsight.data.random import Batches
from linsight.data.values import check_fill
from linsight.errors import LinsightError
from linsight.fuse import fused
from linsight.recipe import Recipe, change
from linsight.runtime.device import autocast, pick_device, pick_dtype
from linsight.runtime.finite import require_finite

from .model import WEIGHTS, Trained, asked_size, image_size
from .run import kept_recipe

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
    fill: float | None = None,
    img_size: Any = None,
) -> dict[str, Any]:
    """Top-1 and top-5 in percent, loss and speed on `data`, by default on what the run was evaluated on.

    `notes` in it are lines about what was left out, or not read as it is. fill: the value of pixels that are no number;
    None: that of the training, if it had one. img_size: of the images, a side or height and width; by default, that of
    the run.

    Raises:
        LinsightError: no such data, classes that the model does not know, or a bad image where those are refused; or
            the model gives what is no number.
    """
    given = prepare(trained, data, split, batch_size, device, amp, workers, on_bad_image, data_dir, fill, img_size)
    recipe, notes = given.recipe, list[str]()

    def after_batch(batch: Batch) -> None:
        refuse(recipe, batch.bad)
        notes.extend(batch.notes)

    started = time.perf_counter()
    scores = score(given.model, given.feed, given.normalise, given.dtype, after_batch)
    require_finite(torch.tensor(scores.loss), f"images of '{recipe.data}'")
    seconds = time.perf_counter() - started
    return {
        "data": recipe.data,
        "classes": len(trained.classes),
        "images": scores.images,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "skipped": len(scores.bad),
        "bad": scores.bad,
        "notes": [*given.notes, *told(notes)],
        "images_per_second": round(scores.images / seconds, 1),
        "device": str(given.normalise.device),
        "precision": given.precision,
    }


class Evaluation(NamedTuple):
    """A model on its device, and the images to evaluate it on. `notes` are what a user should hear of these."""

    recipe: Recipe
    model: nn.Module
    feed: Iterable[Batch]
    normalise: Normalise
    dtype: torch.dtype | None
    precision: str
    notes: tuple[str, ...]


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
    fill: float | None = None,
    img_size: Any = None,
) -> Evaluation:
    """Get ready to evaluate on `data`, by default on what the run was evaluated on."""
    settings = {"batch_size": batch_size, "device": device, "amp": amp, "workers": workers}
    settings |= {"on_bad_image": on_bad_image, "img_size": asked_size(trained, img_size)}
    recipe = change(trained.recipe, settings)
    if data is not None:
        recipe = dataclasses.replace(recipe, data=data, data_dir=data_dir)
    elif trained.run and trained.path.name == WEIGHTS and (kept := kept_recipe(trained.path.parent)) is not None:
        recipe = dataclasses.replace(recipe, **{name: getattr(kept, name) for name in _DATA})
    else:
        raise LinsightError(f"'{trained.path}' is not in a run folder: say what to evaluate on with --data")
    if data is None and split is None:  # the very images, held out or not, that the run was evaluated on
        source = under(open_data(recipe).val, trained.classes, recipe.data)
    else:
        source = open_evaluation(recipe, split, trained.classes, in_order=not trained.run)
    if fill is not None:
        check_fill(fill)
        recipe = dataclasses.replace(recipe, fill=fill)
    where = pick_device(recipe.device)
    dtype, precision = pick_dtype(recipe.amp, where)
    model = fused(trained.model.to(where).eval())
    way = preparation(trained, recipe, model, where)
    samples = Samples(source, way.transform, recipe.in_chans, 0, recipe.fill)
    batches = Batches(len(source), way.batch_size, shuffle=False)
    count = min(default_workers() if recipe.workers is None else recipe.workers, len(batches))
    feed = loader(samples, batches, workers=count, pin=where.type == "cuda")
    return Evaluation(recipe, model, feed, way.normalise, dtype, precision, source.notes)


class Preparation(NamedTuple):
    """How images become what a model takes.

    transform: of an image, to uint8 `(C, H, W)`.  normalise: of a batch of these.  batch_size: how many may be in one.
    size: height and width of what the transform gives; None where it gives each image in its own.
    """

    transform: Callable[[Image.Image], Tensor]
    normalise: Normalise
    batch_size: int
    size: tuple[int, int] | None


def preparation(trained: Trained, recipe: Recipe, model: nn.Module, device: torch.device) -> Preparation:
    """How images become what `model`, the form of `trained` that runs, takes."""
    if trained.pixels:  # images of many sizes make no batch
        return Preparation(whole_image, Unprepared(recipe, device), 1, None)
    size = image_size(recipe, model)
    return Preparation(eval_transform(recipe, size), Normalise(recipe, device), recipe.batch_size, size)


class Scores(NamedTuple):
    """Percent of images whose class is the first, or among the first five; mean loss; what was counted."""

    top1: float
    top5: float
    loss: float
    images: int
    bad: list[str]


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    normalise: Normalise,
    dtype: torch.dtype | None,
    after_batch: Callable[[Batch], None] = lambda batch: None,
) -> Scores:
    """Evaluate `model`, which is left in evaluation mode."""
    model.eval()
    first = fifth = images = 0
    loss = 0.0
    bad: list[str] = []
    for batch in batches:
        bad += batch.bad
        if len(batch.targets):
            with autocast(normalise.device, dtype):
                logits = model(normalise(batch.images))
            targets = batch.targets.to(normalise.device)
            hits = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
            first += int(hits[:, 0].sum())
            fifth += int(hits.sum())
            loss += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
            images += len(targets)
        after_batch(batch)
    if not images:
        raise LinsightError(f"no image could be read: {bad[0] if bad else 'there is none'}")
    return Scores(100 * first / images, 100 * fifth / images, loss / images, images, bad)


@torch.inference_mode()
def probabilities(model: nn.Module, images: Tensor, normalise: Normalise, dtype: torch.dtype | None) -> Tensor:
    """uint8 `(B, C, H, W)` -> class probabilities `(B, classes)`, on the CPU."""
    model.eval()
    with autocast(normalise.device, dtype):
        return model(normalise(images)).float().softmax(-1).cpu()
