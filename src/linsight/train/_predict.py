"""The classes that a trained model sees in image files."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from linsight.data.feeds import refuse
from linsight.data.images import loader, told
from linsight.data.inputs import is_packed
from linsight.data.random import Batches
from linsight.data.sources import Given, images_under
from linsight.data.trees import shown
from linsight.data.values import check_fill
from linsight.errors import LinsightError
from linsight.fuse import fused
from linsight.runtime.device import pick_device, pick_dtype
from linsight.runtime.finite import require_finite
from linsight.runtime.places import located
from linsight.tasks import task_of

from .evaluation import answered, preparation
from .model import Trained, asked_size


def predict(
    trained: Trained,
    paths: Sequence[str | pathlib.Path],
    *,
    top: int = 5,
    batch_size: int | None = None,
    device: str = "auto",
    amp: str = "auto",
    on_bad_image: str = "skip",
    fill: float | None = None,
    img_size: Any = None,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[list[Any], list[str]]:
    """Predictions for image files and for all images in folders; and a line for each that could not be read.

    Of a classifier they are `Prediction`s, of another task what its `predictions` gives.

    Args:
        batch_size: images at a time; None: 64, or what the task takes at once.
        fill: the value of pixels that are no number; None: that of the training, if it had one.
        img_size: of the images, a side or height and width; by default, that of the run.
        note: called with a line about what was left out, or not read as it is.

    Raises:
        LinsightError: a path that does not exist, a folder without images, no readable image at all, or a
            bad image where those are refused; or the model gives what is no number.
    """
    at_once = min(trained.task.at_once, 64) if batch_size is None else batch_size
    settings = {"batch_size": at_once, "device": device, "amp": amp, "on_bad_image": on_bad_image}
    settings["img_size"] = asked_size(trained, img_size)
    recipe = trained.recipe.changed(**settings)
    require_top(top)
    files: list[pathlib.Path] = []
    aside: list[str] = []
    for path in map(located, paths):
        if not os.path.exists(path):
            raise LinsightError(f"no such image or folder: {shown(path)}")
        if path.is_file() and is_packed(path.name):
            raise LinsightError(f"{shown(path)} may have many images: name a file for what is found, --out FILE.csv")
        found = images_under(path, aside) if path.is_dir() else [path]
        if not found:
            raise LinsightError(f"no image in the folder {shown(path)}{''.join(f' ({line})' for line in aside[-1:])}")
        files += found
    for line in aside:
        note(line)
    if fill is not None:
        check_fill(fill)
        recipe = recipe.changed(fill=fill)
    if not files:
        raise LinsightError("no image is given: name image files, or folders of them")
    where = pick_device(recipe.device)
    dtype, _ = pick_dtype(recipe.amp, where)
    model = fused(trained.model.to(where).eval())
    source = Given(files, [shown(file)[1:-1] for file in files], trained.classes)
    task = task_of(recipe, trained.task.facts)
    way = preparation(trained, recipe, model, where)
    task.begin(where)
    task.inputs = way.normalise
    samples = task.samples(source, way.size, training=False)
    done: list[Any] = []
    bad: list[str] = []
    notes: list[str] = []
    batches = Batches(len(files), way.batch_size, shuffle=False)
    for batch in loader(samples, batches, workers=0, pin=False, collate=task.collate):
        bad += batch.bad
        notes += batch.notes
        refuse(recipe, batch.bad)
        if not len(batch.images):
            continue
        names = [str(files[place]) for place in task.places(batch)]
        some = f"'{names[0]}' or another of {len(names)} images" if len(names) > 1 else f"'{names[0]}'"
        answers = answered(task, model, batch, dtype)
        for answer in tree_leaves(answers):
            if isinstance(answer, Tensor):
                require_finite(answer, some)
        done += task.predictions(answers, names, top)
    for line in told(notes):
        note(line)
    if not done:
        raise LinsightError(f"no image could be read: {bad[0]}")
    return done, bad


def require_top(top: int) -> None:
    """Raise a LinsightError unless `top` classes can be told."""
    if not isinstance(top, int) or top < 1:
        raise LinsightError(f"top={top!r} must be a whole number, 1 or more")
