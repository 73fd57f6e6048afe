"""The tasks that there are, by name."""

import importlib
from collections.abc import Mapping
from typing import Any

from linsight.errors import LinsightError
from linsight.recipe import Recipe

from .records import RECORDS, record_of
from .task import Task

# Imported when they are asked for.
_OWN = {
    "classify": ("classify", "Classify"),
    "budget": ("budget", "Budget"),
    "distil": ("distil", "Distil"),
    "linearize": ("linearize", "Linearize"),
    "segment": ("segment", "Segment"),
    "detect": ("detect", "Detect"),
}
_OTHERS: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task known by its name: `train`, `resume`, `evaluate` and `predict` take it from then on. A decorator.

    Raises:
        LinsightError: there is another one of this name.
    """
    if task.name in RECORDS:
        raise LinsightError(f"there is a task '{task.name}' already: call this one otherwise")
    RECORDS[task.name] = task.record
    _OTHERS[task.name] = task
    return task


def unregister(name: str) -> None:
    """Forget a task that `register` made known."""
    del _OTHERS[name], RECORDS[name]


def list_tasks() -> list[type[Task]]:
    """All tasks."""
    return [_task(name) for name in RECORDS]


def task_of(recipe: Recipe, facts: Mapping[str, Any] | None = None) -> Task:
    """The task of a recipe. facts: what its weights tell."""
    record_of(recipe.task)
    return _task(recipe.task)(recipe, facts)


def _task(name: str) -> type[Task]:
    if name in _OTHERS:
        return _OTHERS[name]
    module, cls = _OWN[name]
    return getattr(importlib.import_module(f"linsight.tasks.{module}"), cls)
