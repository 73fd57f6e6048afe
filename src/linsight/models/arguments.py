"""Arguments of models that a room above carries out, once a model is built."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

CARRIED_OUT: dict[str, Callable[[nn.Module, Any], None]] = {}


def add_argument(name: str, carry_out: Callable[[nn.Module, Any], None]) -> None:
    """Let all models of ours be made with the argument `name`: `carry_out(model, value)` changes the built model."""
    CARRIED_OUT[name] = carry_out


def own_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """A model's arguments without those that a room above carries out."""
    return {name: value for name, value in given.items() if name not in CARRIED_OUT}
