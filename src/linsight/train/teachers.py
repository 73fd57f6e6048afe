"""Trained models by name, to learn from."""

import pathlib

from linsight.errors import LinsightError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS

from .hub import LOCAL, recipe_of
from .model import Trained, load_source
from .softmax import create_timm, is_known, is_timm


def load_teacher(name: str, checkpoint: str | None = None) -> Trained:
    """The model that `name` is, with its weights: a run, a file or folder of weights, or a model by name.

    name: a run folder or its best.safetensors; a folder in timm's layout or "hf-hub:OWNER/NAME"; a model of linsight;
        any model of timm, with or without "timm/" before it, whose weights timm has.
    checkpoint: published weights for a model of linsight: a file or an address.

    Raises:
        LinsightError: there is no such model, or its weights cannot be had.
    """
    path = pathlib.Path(name)
    ours = name.partition(".")[0] in {*VARIANTS, *HOSTS, *ARCHITECTURES}
    if checkpoint is None and not path.exists() and (is_timm(name) or (is_known(name) and not ours)):
        return _of_timm(name)
    if "://" in name:
        raise LinsightError(
            f"'{name}' does not tell which model it has weights of: name the model as teacher, and give the address as "
            f"teacher_checkpoint"
        )
    return load_source(name.removeprefix(LOCAL), checkpoint, option="teacher_checkpoint")


def _of_timm(name: str) -> Trained:
    model = create_timm(name).eval()
    recipe = recipe_of({"architecture": name.partition("/")[2] or name}, model)
    classes = tuple(map(str, range(recipe.num_classes or 0)))
    return Trained(model, recipe, classes, pathlib.Path(name), run=False)
