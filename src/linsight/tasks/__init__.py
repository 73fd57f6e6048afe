"""Tasks: what a model learns, on which images, with which loss, and how well it does it."""

from typing import TYPE_CHECKING

from linsight.runtime.lazy import lazily

from .records import ClassifyRecipe, field_of, known_fields, read_recipe, record_of

if TYPE_CHECKING:
    from .classify import Classify, Prediction
    from .registry import list_tasks, register, task_of, unregister
    from .task import Column, Shown, Student, Task

__all__ = [
    "Classify",
    "ClassifyRecipe",
    "Column",
    "Prediction",
    "Shown",
    "Student",
    "Task",
    "field_of",
    "known_fields",
    "list_tasks",
    "read_recipe",
    "record_of",
    "register",
    "task_of",
    "unregister",
]

# Imported when they are asked for: the help of a command needs the records alone.
_HOMES = {
    "classify": ("Classify", "Prediction"),
    "registry": ("list_tasks", "register", "task_of", "unregister"),
    "task": ("Column", "Shown", "Student", "Task"),
}
__getattr__ = lazily(__name__, {name: home for home, names in _HOMES.items() for name in names})
