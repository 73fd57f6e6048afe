"""`config.json` and `summary.json` of a run folder, which may be anybody's: checked before anything of them is used."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.records import shown
from linsight.runtime.files import read_json
from linsight.tasks import read_recipe, task_of

_MOST = 4096  # threads, as in a recipe


class Config(NamedTuple):
    """A run as its config.json tells: name, recipe, facts of its data, and the threads that it computes with."""

    name: str
    recipe: Recipe
    data: dict[str, Any]
    threads: int


def read_config(path: pathlib.Path) -> Config:
    """Read a config.json.

    Raises:
        LinsightError: no such file, no JSON, or a value in it that no run has.
    """
    found = read_json(path)

    def part(name: str, kind: type, words: str) -> Any:
        if name not in found:
            raise LinsightError(f"'{path}' is damaged: it has no '{name}'")
        value = found[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise LinsightError(f"'{path}' is damaged: {name}={shown(value)} is not {words}")
        return value

    name = part("name", str, "text")
    recipe = part("recipe", dict, "an object of JSON")
    data = part("data", dict, "an object of JSON")
    threads = part("threads", int, "a whole number")
    if not 1 <= threads <= _MOST:
        raise LinsightError(f"'{path}' is damaged: threads={shown(threads)} is not between 1 and {_MOST}")
    return Config(name, _recipe(path, recipe), data, threads)


def _recipe(path: pathlib.Path, values: Mapping[str, Any]) -> Recipe:
    try:
        return read_recipe(values)
    except LinsightError as error:
        raise LinsightError(f"the recipe in '{path}' cannot be used: {error}") from error


_SUMMARY: dict[str, Any] = {"best_epoch": int, "epochs": int, "seconds": (int, float), "folder": str}


def read_summary(path: pathlib.Path, recipe: Recipe) -> dict[str, Any]:
    """Read the summary.json of a run by `recipe`.

    Raises:
        LinsightError: no such file, no JSON, or it lacks what every summary has.
    """
    found = read_json(path)
    for name, kind in _SUMMARY.items():
        value = found.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or not _is_small(value):
            raise LinsightError(f"'{path}' is damaged: {name}={shown(value)} is not what a run writes")
    count = found.get("classes", 0)
    if not isinstance(count, int) or not 0 <= count <= 10**7 or found.get("task", recipe.task) != recipe.task:
        raise LinsightError(f"'{path}' is damaged: it is of another task, or of no number of classes")
    best, *others = task_of(recipe, {"classes": tuple(map(str, range(count)))}).columns
    for name in (best.key, f"last_{best.key}", *(column.key for column in others)):
        value = found.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_small(value):
            raise LinsightError(f"'{path}' is damaged: {name}={shown(value)} is no number")
    return found


def _is_small(value: Any) -> bool:
    """False for what is no number, and for numbers that no float holds."""
    return isinstance(value, str) or -1e300 < value < 1e300
