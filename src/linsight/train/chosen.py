"""A recipe by name with some fields changed, and the one for a run that names none."""

from collections.abc import Mapping, Sequence
from typing import Any

from linsight.errors import UnknownNameError
from linsight.models import create_model
from linsight.recipe import DATA_FIELDS, Recipe, change, parse

from .datasets import open_data
from .recipes import RECIPES


def resolve(name: str = "digits", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe `name` with some fields changed; values may be text, as on the command line.

    Changing `model` drops the recipe's `model_args`, and changing `attention` its `attention_options`,
    which belong to what they replace.

    Raises:
        UnknownNameError: no such recipe, field or choice; the nearest is offered.
        LinsightError: a value of the wrong kind or out of range.
    """
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    given = {field: parse(field, value) for field, value in (overrides or {}).items()}
    for head, dependent in (("model", "model_args"), ("attention", "attention_options")):
        if head in given and given[head] != getattr(RECIPES[name].recipe, head):
            given.setdefault(dependent, {})
    return change(RECIPES[name].recipe, given)


def suggest(overrides: Mapping[str, Any]) -> str:
    """The recipe for a run that names none: one for images of the size of its model, or else of its data.

    Raises:
        LinsightError: the model or the data cannot be used.
    """
    if overrides.get("data", "digits") == "digits":
        return "digits"
    if "model" in overrides:
        config: Any = create_model(overrides["model"], device="meta").pretrained_cfg
        return _for_size(config["input_size"][-2:])
    data = {name: value for name, value in overrides.items() if name in DATA_FIELDS}
    source = open_data(resolve("photos", data)).train
    for index in range(min(len(source), 10)):  # the first ones may be damaged
        try:
            return _for_size(source.image(index, "RGB").size)
        except (OSError, SyntaxError, ValueError):
            continue
    return "photos"


def _for_size(sides: Sequence[int]) -> str:
    return "cifar10" if max(sides) <= 64 else "photos"
