"""What a builder of golden cases works with: the json of a case, its filled inputs, what it returns."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from golden.fill import fill_input
from linsight import Grid
from linsight.attention import Rename

REDUCTION = (Rename("sr.", "reduction.sr."), Rename("norm.", "reduction.norm."))


class Run(NamedTuple):
    """A module ready to load a case, the call on it, and key rules beyond those of its mechanisms.

    call: gives the output of the case, or (for a case with several) outputs by their names in the npz.
    inputs: those whose gradients are recorded, by name; they require gradients.
    """

    module: nn.Module
    call: Callable[[], Tensor | dict[str, Tensor]]
    renames: tuple[Rename, ...] = ()
    inputs: Mapping[str, Tensor] = {}


def tensor(shape: list[int], name: str = "input") -> Tensor:
    """An input of a case."""
    return torch.from_numpy(fill_input(tuple(shape), name))


def on_map(layer: nn.Module, spec: dict[str, Any]) -> Callable[[], Tensor]:
    """The call of a layer on a map `(B, C, H, W)`."""
    x = tensor(spec["input_shape"])
    size = x.shape[2:]
    return lambda: layer(x.flatten(2).transpose(1, 2), Grid(*size)).transpose(1, 2).unflatten(2, size)


def heads(spec: dict[str, Any]) -> int:
    """Heads as configured, or traced, or (one family of cases has them nowhere else) named."""
    if "num_heads" in spec.get("config", {}):
        return int(spec["config"]["num_heads"])
    for entry in spec["trace"].values():
        if len(entry["shape"]) == 4 and entry["shape"][2:] != spec["input_shape"][2:]:
            return int(entry["shape"][2])
    found = re.search(r"h(\d+)", spec["name"])
    assert found, f"no head count in {spec['name']}"
    return int(found[1])
