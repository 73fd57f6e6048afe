"""Scores of a trained model on a data set, and of any model on batches of images."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from linsight.data.feeds import readers, refuse
from linsight.data.images import Batch, Normalise, Unprepared, eval_transform, loader, told, whole_image
from linsight.data.random import Batches
from linsight.data.values import check_fill
from linsight.data.watched import watched
from linsight.errors import LinsightError
from linsight.fuse import fused
from linsight.recipe import Recipe
from linsight.runtime.device import autocast, pick_device, pick_dtype
from linsight.runtime.finite import require_finite
from linsight.runtime.launch import ALONE, Copy
from linsight.runtime.processes import Processes
from linsight.tasks import Task, task_of
from linsight.tasks.building import image_size
from linsight.tasks.meters import Meter

from .model import WEIGHTS, Trained, asked_size
from .run import kept_recipe

_DATA = ("data", "data_dir", "train_split", "val_split", "val_fraction", "image_key", "label_key")


def evaluate(
    trained: Trained,
    *,
    data: str | None = None,
    split: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    amp: str = "auto",
    workers: int | None = None,
    on_bad_image: str = "skip",
    data_dir: str | None = None,
    fill: float | None = None,
    img_size: Any = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """The measures of its task and the speed on `data`, by default on what the run was evaluated on.

    Of a classifier: `top1` and `top5` in percent, and `loss`.

    `notes` in it are lines about what was left out, or not read as it is. fill: the value of pixels that are no number;
    None: that of the training, if it had one. img_size: of the images, a side or height and width; by default, that of
    the run. batch_size: by default, what the task takes at once.
    processes: that evaluate together, each its share of the images; the result is that of all.

    Raises:
        LinsightError: no such data, classes that the model does not know, or a bad image where those are refused; or
            the model gives what is no number.
    """
    processes = processes or Processes()
    settings = (
        trained.task.at_once if batch_size is None else batch_size,
        str(processes.device(device)),
        amp,
        workers,
        on_bad_image,
        data_dir,
        fill,
        img_size,
    )
    given = prepare(trained, data, split, *settings, copy=processes.copy)
    recipe, notes = given.task.recipe, list[str]()

    def after_batch(batch: Batch) -> None:
        refuse(recipe, batch.bad)
        notes.extend(batch.notes)

    started = time.perf_counter()
    scores = score(given.task, given.model, watched(given.feed), given.dtype, after_batch, gather=processes.gather)
    notes = [note for told_of in processes.gather(notes) for note in told_of]
    require_finite(torch.tensor([*scores.measures.values()]), f"images of '{recipe.data}'")
    seconds = time.perf_counter() - started
    return {
        "data": recipe.data,
        "task": given.task.name,
        "classes": len(trained.classes),
        "images": scores.images,
        **scores.measures,
        "skipped": len(scores.bad),
        "bad": scores.bad,
        "notes": [*given.notes, *told(notes)],
        "images_per_second": round(scores.images / seconds, 1),
        "device": str(given.task.inputs.device),
        "precision": given.precision,
    }


class Evaluation(NamedTuple):
    """A model on its device, its task, which has begun there, and the images to evaluate it on.

    notes: what a user should hear of these.
    """

    task: Task
    model: nn.Module
    feed: Iterable[Batch]
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
    *,
    make: Callable[[Recipe, Mapping[str, Any]], Task] = task_of,
    copy: Copy = ALONE,
) -> Evaluation:
    """Get ready to evaluate on `data`, by default on what the run was evaluated on.

    make: the task of a recipe.  copy: the process, of those that share the images.
    """
    settings = {"batch_size": batch_size, "device": device, "amp": amp, "workers": workers}
    settings |= {"on_bad_image": on_bad_image, "img_size": asked_size(trained, img_size)}
    recipe = trained.recipe.changed(**settings)
    if data is not None:
        recipe = recipe.changed(data=data, data_dir=data_dir)
    elif trained.run and trained.path.name == WEIGHTS and (kept := kept_recipe(trained.path.parent)) is not None:
        recipe = recipe.changed(**{name: getattr(kept, name) for name in _DATA})
    else:
        raise LinsightError(f"'{trained.path}' is not in a run folder: say what to evaluate on with --data")
    facts = trained.task.facts
    if data is None and split is None:  # the very images, held out or not, that the run was evaluated on
        source = make(recipe, facts).open_again()
    else:
        source = make(recipe, facts).open_evaluation(split, in_order=not trained.run)
    if fill is not None:
        check_fill(fill)
        recipe = recipe.changed(fill=fill)
    task = make(recipe, facts)
    where = pick_device(recipe.device)
    dtype, precision = pick_dtype(recipe.amp, where)
    model = fused(trained.model.to(where).eval())
    way = preparation(trained, recipe, model, where)
    task.begin(where)
    task.inputs = way.normalise
    samples = task.samples(source, way.size, training=False)
    batches = Batches(len(source), way.batch_size, shuffle=False)
    count = min(readers(recipe, copy), len(batches))
    feed = loader(samples, batches, workers=count, pin=where.type == "cuda", collate=task.collate, copy=copy)
    return Evaluation(task, model, feed, dtype, precision, source.notes)


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
    """The measures of a task, by name, and what was counted."""

    measures: dict[str, float]
    images: int
    bad: list[str]


_Count: TypeAlias = tuple[Meter, int, list[str]]


def _alone(count: _Count) -> list[_Count]:
    return [count]


@torch.inference_mode()
def score(
    task: Task,
    model: nn.Module,
    batches: Iterable[Batch],
    dtype: torch.dtype | None,
    after_batch: Callable[[Batch], None] = lambda batch: None,
    meter: Meter | None = None,
    gather: Callable[[_Count], list[_Count]] = _alone,
) -> Scores:
    """Evaluate `model`, which is left in evaluation mode, by a task that has begun.

    meter: of the task, a new one unless told.  gather: the counts of several processes, from this one's.
    """
    model.eval()
    meter = task.measure() if meter is None else meter
    images, bad = 0, list[str]()
    for batch in batches:
        bad += batch.bad
        if len(batch.images):
            with autocast(task.inputs.device, dtype):
                answers = task.answers(model, batch)
            meter.update(answers, batch)
            images += len(batch.images)
        after_batch(batch)
    meter, images, bad = _counted(gather((meter, images, bad)))
    if not images:
        raise LinsightError(f"no image could be read: {bad[0] if bad else 'there is none'}")
    return Scores(meter.compute(), images, bad)


def _counted(found: list[_Count]) -> _Count:
    """The counts of several processes as one."""
    counted = [meter for meter, images, _ in found if images] or [found[0][0]]
    for other in counted[1:]:
        if not hasattr(other, "merge_state"):
            name = type(other).__name__
            raise LinsightError(
                f"the meter {name} has no merge_state, by which processes count together: use one process"
            )
        counted[0].merge_state(other)
    return counted[0], sum(images for _, images, _ in found), [line for *_, bad in found for line in bad]


@torch.inference_mode()
def answered(task: Task, model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> Any:
    """The answers of `model` to a batch, by a task that has begun: tensors on the CPU, numbers as float32."""
    model.eval()
    with autocast(task.inputs.device, dtype):
        found = task.answers(model, batch)
    return tree_map_only(Tensor, _plain, found)


def _plain(answer: Tensor) -> Tensor:
    return answer.float().cpu() if answer.is_floating_point() else answer.cpu()


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor, normalise: Normalise, dtype: torch.dtype | None) -> Tensor:
    """uint8 `(B, C, H, W)` -> what the model gives, in float32 on the CPU."""
    model.eval()
    with autocast(normalise.device, dtype):
        return model(normalise(images)).float().cpu()


def probabilities(model: nn.Module, images: Tensor, normalise: Normalise, dtype: torch.dtype | None) -> Tensor:
    """uint8 `(B, C, H, W)` -> class probabilities `(B, classes)`, on the CPU."""
    return outputs(model, images, normalise, dtype).softmax(-1)
