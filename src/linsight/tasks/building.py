"""The model of a recipe."""

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from linsight.convert import converted_layers
from linsight.errors import LinsightError
from linsight.models import ARCHITECTURES, VARIANTS, create_model, default_attention
from linsight.recipe import Recipe

_LARGE = 4096  # width, depth, or side of images


def build(recipe: Recipe, num_classes: int) -> nn.Module:
    """The classifier of a recipe, with fresh weights."""
    require_classifier(recipe.model)
    return built(recipe, num_classes, create_model)


def built(recipe: Recipe, num_classes: int, make: Callable[..., nn.Module]) -> nn.Module:
    """The model of a recipe, with fresh weights, by `make(name, *, attention, attention_options, num_classes, ...)`."""
    arguments: dict[str, Any] = {
        "num_classes": recipe.num_classes or num_classes,
        "in_chans": recipe.in_chans,
        "img_size": (recipe.img_size * 2)[:2] or None,
        "drop_path_rate": recipe.drop_path,
    }
    for name in recipe.model_args:
        if name in arguments:
            raise LinsightError(f"model_args has '{name}', which is a field of its own")
    if recipe.model_args.get("features_only"):
        raise LinsightError("model_args has features_only: such a model gives maps and has no classifier, leave it out")
    try:
        return make(
            recipe.model,
            attention=recipe.attention,
            attention_options=recipe.attention_options or None,
            **arguments,
            **recipe.model_args,
        )
    except TypeError as error:
        raise LinsightError(f"model_args do not fit '{recipe.model}': {error}") from error


def attention_of(recipe: Recipe, model: nn.Module) -> str:
    """The mechanism in the model of a recipe, where some was converted that of the conversion; "" where it has none."""
    if recipe.model in ARCHITECTURES:
        return ""
    converted = dict.fromkeys(row.attention for row in converted_layers(model).values())
    return ", ".join(converted) or recipe.attention or default_attention(recipe.model)


def looks_large(recipe: Recipe) -> bool:
    """True for a recipe with a number about its model that is larger than those of published ones."""
    numbers = [value for value in recipe.model_args.values() if isinstance(value, int | float)]
    return max([*recipe.img_size, *numbers], default=0) > _LARGE


def require_classifier(name: str) -> None:
    """Raise a LinsightError where the model `name` has no classifier; the one of its kind that has is named."""
    own = VARIANTS.get(name)
    if own is not None and own.dense:
        same = [
            other.name
            for other in VARIANTS.values()
            if not other.dense and (other.host, other.attention) == (own.host, own.attention)
        ]
        near = difflib.get_close_matches(name, same, n=1, cutoff=0)
        way = f"take '{near[0]}'" if near else "take one that 'linsight list' shows a top-1 of"
        raise LinsightError(f"'{name}' gives the maps of its stages and has no classifier: {way}")


def image_size(recipe: Recipe, model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that the model is given."""
    size = recipe.img_size or tuple(model.pretrained_cfg["input_size"][-2:])  # type: ignore[index]
    return int(size[0]), int(size[-1])
