"""Which layers of a conversion stay softmax."""

from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.device import pick_device
from linsight.tasks import task_of
from linsight.tasks.linearize import Linearize

from .teachers import load_teacher


def split_layers(recipe: Recipe, keep: int) -> tuple[list[str], list[str]]:
    """Names of the layers to convert, and of the `keep` layers that are hardest to replace, which best stay softmax.

    They are found on the recipe's data, see `Linearize.hardest`. The first ones are what `layers` is to be.

    Args:
        recipe: of the task `linearize`.

    Raises:
        LinsightError: no layer would be left to convert, or the recipe is of another task.
    """
    task = task_of(recipe)
    if not isinstance(task, Linearize):
        raise LinsightError(f"task={recipe.task} converts no layers: softmax is kept in those of task=linearize")
    replaced, kept = task.hardest(keep, pick_device(recipe.device), load_teacher)
    if not replaced:
        raise LinsightError(f"keep={keep} leaves no layer to convert: there are {len(kept)}")
    return replaced, kept
