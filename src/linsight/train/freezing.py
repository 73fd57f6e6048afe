"""Parameters that a run does not train: all but what is new, or those of the first layers."""

from collections.abc import Collection

from timm.models import group_parameters
from torch import nn

from linsight.errors import LinsightError
from linsight.recipe import Recipe

_BY_LAYERS = {"freeze_layers": False, "freeze_stages": True}  # the fields, and timm's `coarse`


def freeze(model: nn.Module, recipe: Recipe, new: Collection[str] | None) -> list[nn.Module]:
    """Take the gradient from the parameters that `recipe` keeps; the batch norms whose statistics are kept with them.

    new: names of the parameters that `init` did not fill, which are trained wherever they are; None without `init`.

    Raises:
        LinsightError: there is nothing to keep, or nothing else to train.
    """
    asked = {name: count for name in _BY_LAYERS if (count := getattr(recipe, name))}
    if new is None and (recipe.freeze or recipe.new_lr_scale != 1):
        raise LinsightError("freeze and new_lr_scale part what init fills from what is new: give it weights, init=")
    if new is None and asked:
        raise LinsightError(f"{next(iter(asked))} keeps what init fills as it is: give it weights, init=")
    if recipe.freeze and not new:
        raise LinsightError("init fills every parameter: freeze trains a new head where init_partial is off")
    kept = {name for name, _ in model.named_parameters()} if recipe.freeze else set[str]()
    for name, count in asked.items():
        kept |= _first(model, recipe.model, name, count)
    kept -= set(new or ())
    for name in kept:
        model.get_parameter(name).requires_grad_(False)
    return [module for module in model.modules() if kept and _is_still(module, recipe.freeze)]


def layer_groups(model: nn.Module, name: str, *, stages: bool = False) -> dict[str, int]:
    """The layer group of each parameter as timm numbers them, from 0: the rates of `layer_decay` go by these.

    stages: one group for each stage, where the model has stages.

    Raises:
        LinsightError: the model called `name` has no groups.
    """
    if not hasattr(model, "group_matcher"):
        raise LinsightError(f"'{name}' does not tell its layers (group_matcher): freeze_layers is for models that do")
    return group_parameters(model, model.group_matcher(coarse=stages), reverse=True)  # type: ignore[operator]


def _first(model: nn.Module, name: str, field: str, count: int) -> set[str]:
    """The parameters of the first `count` groups."""
    groups = layer_groups(model, name, stages=_BY_LAYERS[field])
    last = max(groups.values())
    if count > last:
        raise LinsightError(
            f"{field}={count} leaves nothing to train: '{name}' has {last} groups before its last one, which has the "
            f"classifier"
        )
    return {parameter for parameter, group in groups.items() if group < count}


def _is_still(module: nn.Module, all_kept: bool) -> bool:
    """True for a batch norm that is not trained; one without weights is where nothing but what is new is trained."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    weights = [parameter.requires_grad for parameter in module.parameters()]
    return not any(weights) if weights else all_kept
