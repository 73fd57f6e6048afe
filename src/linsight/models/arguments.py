"""Arguments of models that a room above carries out, once a model is built."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

CARRIED_OUT: dict[str, Callable[[nn.Module, Any], None]] = {}


def add_argument(name: str, change: Callable[[nn.Module, Any], None]) -> None:
    """Let all models of ours be made with the argument `name`: `change(model, value)` changes the built model."""
    CARRIED_OUT[name] = change


def take(given: dict[str, Any]) -> dict[str, Any]:
    """Take out of a model's arguments those that a room above carries out."""
    return {name: given.pop(name) for name in CARRIED_OUT if name in given}


def carry_out(model: nn.Module, taken: Mapping[str, Any]) -> None:
    """Change a built model as arguments say that `take` gave."""
    for name, value in taken.items():
        CARRIED_OUT[name](model, value)


def own_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """A model's arguments without those that a room above carries out."""
    return {name: value for name, value in given.items() if name not in CARRIED_OUT}
