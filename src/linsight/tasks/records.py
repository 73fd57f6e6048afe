"""The recipes of tasks: what every run has, and what a task adds. Without torch, for the help of a command."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from linsight.errors import LinsightError, UnknownNameError
from linsight.recipe import TASK, Recipe
from linsight.records import NONE, NotNegative, Positive, Record, Share, Sides, Text, shown


class MixFields(Record):
    """Mixed images, and soft labels."""

    group = "Augmentation"

    mixup: NotNegative = Field(default=0.0, description="alpha of mixup, 0 is off")
    cutmix: NotNegative = Field(default=0.0, description="alpha of cutmix, 0 is off")
    mixup_prob: Share = Field(default=1.0, description="share of batches that are mixed")
    mixup_switch_prob: Share = Field(default=0.5, description="share of those that get cutmix, where both are on")
    smoothing: Share = Field(default=0.0, description="label smoothing")


class MesaFields(Record):
    """Learning from the averaged weights."""

    group = "Optimisation"

    mesa: NotNegative = Field(
        default=0.0, description="weight of a second loss, against what the averaged weights say; 0 is off"
    )
    mesa_start: Share = Field(default=0.25, description="share of the epochs after which that loss sets in")


class ClassifyRecipe(Recipe, MixFields, MesaFields):
    """A run of the task `classify`."""

    task: Literal["classify"] = Field(default="classify", description=TASK)

    @model_validator(mode="after")
    def _mixes(self) -> Self:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise LinsightError(
                f"mixup and cutmix pair the images of a batch: batch_size={self.batch_size} must be even"
            )
        if self.mesa and not self.ema:
            raise LinsightError(f"mesa={self.mesa:g} learns from averaged weights: set their decay, as in ema=0.9999")
        return self


class BudgetRecipe(ClassifyRecipe):
    """A run of the task `budget`."""

    task: Literal["budget"] = Field(default="budget", description=TASK)  # type: ignore[assignment]


class DistilFields(Record):
    """Learning from another model."""

    group = "Optimisation"

    teacher: Annotated[Text | None, NONE] = Field(
        default=None, description="who is learned from: a run, a model of linsight or timm by name, hf-hub:OWNER/NAME"
    )
    teacher_checkpoint: Annotated[Text | None, NONE] = Field(
        default=None, description="published weights of a teacher given by name: a file or an address"
    )
    teacher_size: Sides = Field(default=(), description="side, or height and width, that it sees; empty: its own")
    distil_kind: Literal["soft", "hard", "features", "map"] = Field(
        default="soft",
        description="learned from it: its probabilities, its decision, its pooled features, its last map of them",
    )
    distil_weight: Share = Field(default=0.5, description="share of that in the loss; the rest is that of the labels")
    distil_temperature: Positive = Field(default=2.0, description="logits are divided by it, for distil_kind soft")
    distil_distance: Literal["mse", "cosine"] = Field(
        default="mse", description="between features, each set standardised: squared error, or 1 minus the cosine"
    )


class DistilRecipe(ClassifyRecipe, DistilFields):
    """A run of the task `distil`."""

    task: Literal["distil"] = Field(default="distil", description=TASK)  # type: ignore[assignment]


# By the names of their tasks. `linsight.tasks.register` adds others.
RECORDS: dict[str, type[Recipe]] = {"classify": ClassifyRecipe, "budget": BudgetRecipe, "distil": DistilRecipe}


def record_of(task: Any) -> type[Recipe]:
    """The kind of recipe of a task; an UnknownNameError offers the nearest."""
    if not isinstance(task, str) or task not in RECORDS:
        raise UnknownNameError("task", shown(task, str), RECORDS)
    return RECORDS[task]


def read_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe of its values, as `Recipe.values` gives them or as text; without a task it is of `classify`.

    Raises:
        LinsightError: see `linsight.records.Record`.
    """
    return record_of(values.get("task", "classify"))(**values)


def known_fields() -> dict[str, type[Recipe]]:
    """The fields of all tasks, each with the first kind of recipe that has it."""
    found: dict[str, type[Recipe]] = {}
    kinds: list[type[Recipe]] = [Recipe, *RECORDS.values()]  # whose first has any task
    for kind in kinds:
        for name in kind.model_fields:
            found.setdefault(name, kind)
    return found


def field_of(name: str) -> type[Recipe]:
    """A kind of recipe that has the field `name`; an UnknownNameError offers the nearest of all."""
    known = known_fields()
    if name not in known:
        raise UnknownNameError("recipe field", shown(name, str), known)
    return known[name]
