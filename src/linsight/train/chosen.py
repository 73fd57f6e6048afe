"""A recipe by name with some fields changed, and the one for a run that names none."""

from collections.abc import Mapping, Sequence
from typing import Any

from linsight.data.datasets import open_data
from linsight.data.images import decode
from linsight.errors import UnknownNameError
from linsight.models import create_model
from linsight.models.arguments import own_arguments
from linsight.recipe import Recipe, averaged, require_known
from linsight.runtime.places import located
from linsight.tasks import field_of, known_fields, record_of, task_of
from linsight.tasks.files import is_recipe_file, read_values

from .hub import PREFIX
from .model import kept_fields
from .recipes import FINETUNE, MASKS, OBJECTS, RECIPES
from .run import WEIGHTS, kept_recipe
from .softmax import is_timm, told

_OF_TASKS = {"detect": OBJECTS, "segment": MASKS}  # recipes of runs that name none


def resolve(name: str = "digits", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe `name` with some fields changed; values may be text, as on the command line.

    name: of a shipped recipe, or of a file (`linsight.tasks.files`), which may start from a shipped one.

    Changing `model` drops the recipe's `model_args`, and changing `attention` its `attention_options`,
    which belong to what they replace. The recipe `finetune` keeps the model and the images of the run that it
    starts from, by `init`, or `teacher` of `linearize`; of its data, too, where there is no other.

    Raises:
        UnknownNameError: no such recipe, field or choice; the nearest is offered.
        LinsightError: a value of the wrong kind or out of range.
    """
    overrides = dict(overrides or {})
    if is_recipe_file(name):
        start, values = read_values(name)
        overrides = {**values, **overrides}
        base = Recipe() if start is None else _shipped(start)
        name = start or name
    else:
        base = _shipped(name)
    base = _of_task(base, overrides.pop("task", base.task))
    _require_fields(base, overrides)
    given = base.parse_all(overrides)
    if name == FINETUNE and given.get(base.START):
        kept = _kept(given[base.START], "data" not in given)
        base = base.changed(**{field: value for field, value in kept.items() if field in type(base).model_fields})
    kept_args = own_arguments(base.model_args)
    if "attention" in given:  # named anew, so not as it was converted
        base = base.changed(model_args=kept_args)
    elif "model_args" in given and given.get("model", base.model) == base.model:
        converted = {field: value for field, value in base.model_args.items() if field not in kept_args}
        given["model_args"] = {**converted, **given["model_args"]}
    for head, dependent in (("model", "model_args"), ("attention", "attention_options")):
        if head in given and given[head] != getattr(base, head):
            given.setdefault(dependent, {})
    given = {**averaged(base, given.get("in_chans", base.in_chans)), **given}
    recipe = base.changed(**given)
    require_known(recipe)
    return recipe


def _of_task(base: Recipe, task: Any) -> Recipe:
    """A recipe as one of another task, as far as that has the fields; what is by default is so there."""
    record = record_of(task)
    if type(base) is record:
        return base
    shared = {name: value for name, value in base.differences().items() if name in record.model_fields}
    return record(**{**shared, "task": task})


def _require_fields(base: Recipe, given: Mapping[str, Any]) -> None:
    """Raise where a field is one of another task alone; a field of none is left to the record."""
    known = known_fields()
    for name in given:
        if name not in type(base).model_fields and name in known:
            task = known[name].model_fields["task"].default
            raise UnknownNameError("recipe field", name, type(base).model_fields, f"task={task} has it")


def _shipped(name: str) -> Recipe:
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES, "or a file that ends in .yaml, .toml or .json")
    return RECIPES[name].recipe


def _kept(init: str, data: bool) -> Mapping[str, Any]:
    """Fields of the run that weights are of, as far as they tell: of its model and images, and, if asked, its data."""
    if is_timm(init):
        return told(init)
    if "://" in init or init.startswith(PREFIX):
        return kept_fields(init)
    path = located(init)
    folder = path if path.is_dir() else path.parent if path.name == WEIGHTS else None
    kept = kept_recipe(folder) if folder else None
    if kept is None:
        return kept_fields(str(path))
    groups = {"Model", "Augmentation", *(["Data"] if data else [])}
    names = (name for name in kept.in_group(*groups) if not name.startswith(("init", "from", "num_classes", "task")))
    fields = {name: getattr(kept, name) for name in names}
    return {**fields, **task_of(kept).as_start()}


def told_channels(name: str, recipe: Recipe) -> str:
    """A line where `resolve` averaged the mean and std of the recipe `name` for other channels; or nothing."""
    if name not in RECIPES:
        return ""
    own = RECIPES[name].recipe
    made = [field for field, numbers in averaged(own, recipe.in_chans).items() if getattr(recipe, field) == numbers]
    if not made:
        return ""
    numbers = " and ".join(f"{field} {getattr(recipe, field)[0]:g}" for field in made)
    return f"in_chans={recipe.in_chans}: {numbers}, the average of the {len(own.mean)} channels of recipe {name}"


def suggest(overrides: Mapping[str, Any]) -> str:
    """The recipe for a run that names none: `finetune` where it starts from weights, that of its task where it has one,
    else one for images of the size of its model, or else of its data.

    Raises:
        LinsightError: the model or the data cannot be used.
    """
    if overrides.get("init") is not None:
        return FINETUNE
    if overrides.get("task") in _OF_TASKS:
        return _OF_TASKS[overrides["task"]]
    if overrides.get("data", "digits") == "digits":
        return "digits"
    if "model" in overrides:
        config: Any = create_model(overrides["model"], device="meta").pretrained_cfg
        return _for_size(config["input_size"][-2:])
    data = {name: value for name, value in overrides.items() if field_of(name).groups()[name] == "Data"}
    source = open_data(resolve("photos", data)).train
    for index in range(min(len(source), 10)):  # the first ones may be damaged
        image = decode(source, index, "RGB")
        if not isinstance(image, str):
            return _for_size(image.size)
    return "photos"


def _for_size(sides: Sequence[int]) -> str:
    return "cifar10" if max(sides) <= 64 else "photos"
