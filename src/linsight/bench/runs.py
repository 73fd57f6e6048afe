"""A trained run's model beside the same host with softmax, at several sizes of images."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from linsight.errors import LinsightError
from linsight.models.arguments import own_arguments
from linsight.tasks import task_of
from linsight.tasks.building import attention_of, build
from linsight.train import load_trained

from ._subjects import Group, Subject
from .rows import Row
from .run import Plan, bench
from .steps import Setting, measure


def run_speed(run: str | Path, sizes: Sequence[tuple[int, int]], setting: Setting) -> list[Row]:
    """Rows of a forward of one image, of the run's model and then of softmax, for each of `sizes`, height and width.

    Raises:
        LinsightError: no run of a classifier of ours is there, or its model has softmax only.
    """
    trained = load_trained(run)
    if not trained.task.sorts or attention_of(trained.recipe, trained.model) in ("", "softmax"):
        raise LinsightError(f"'{run}' is no classifier whose host could have softmax in its mechanism's place")
    ours, softmax = Subject("model", str(run)), Subject("model", str(run), "softmax")
    plan = Plan((Group((ours,), softmax),), tuple((*size, 1) for size in sizes), setting, ("infer",))
    *_, done = bench(plan, functools.partial(measure, build=build_run))
    return done.rows


def build_run(subject: Subject, size: tuple[int, int], device: str | torch.device) -> nn.Module:
    """The model of the run in the folder `subject.name`, with fresh weights and for images of `size`.

    With softmax, where the subject names an attention.
    """
    trained = load_trained(subject.name)
    recipe = trained.recipe.changed(img_size=size, in_chans=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.device(device):
        if subject.attention:
            own = {"attention_options": {}, "model_args": own_arguments(recipe.model_args)}
            return build(recipe.changed(attention=subject.attention, **own), len(trained.classes))
        return task_of(recipe, trained.task.facts).build()
