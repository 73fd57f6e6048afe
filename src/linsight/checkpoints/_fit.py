"""Where the tensors of a checkpoint go in a model; nothing is copied here."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from linsight.attention import Attention
from linsight.models import fit_bias_table
from linsight.ops import FittedTable

from ._projections import Entry, regroup
from .keys import is_constant, key_map, to_ours
from .report import Mismatch, shape_text


@dataclasses.dataclass
class Fitted:
    """A checkpoint matched with a model. ready: tensors by our keys, in its shapes.  The rest as in `LoadReport`."""

    ready: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    resized: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    problems: list[Mismatch] = dataclasses.field(default_factory=list)


def fit(
    model: nn.Module, tensors: Mapping[str, Tensor], *, head: bool = True, resize: bool = True, pruned: bool = False
) -> Fitted:
    """Match `tensors`, by published keys or ours, with the state of `model`.

    head: False leaves the classifier alone.  resize: resample position tables.  pruned: the model lacks
    modules on purpose, as timm's `features_only` makes it.
    """
    own = model.state_dict()
    # A file in our own layout is as welcome as a published one.
    entries = max((convert(model, tensors, named=n) for n in (True, False)), key=lambda e: len(e.keys() & own.keys()))
    done = Fitted()
    for key, target in own.items():
        entry = entries.pop(key, None)
        if not head and in_classifier(model, key):
            done.kept.append(key)
            if entry:
                done.dropped.append(f"{entry.key} (head=False)")
        elif entry is not None:
            _place(model, key, entry, target, resize, done)
        elif is_constant(key):
            done.kept.append(key)
        else:
            done.problems.append(Mismatch(key, "", shape_text(target.shape), "not in the checkpoint"))
    for key, entry in entries.items():
        reason = _reason_to_drop(model, key, head, pruned)
        if reason:
            done.dropped.append(f"{entry.key} ({reason})")
        else:
            done.problems.append(Mismatch(entry.key, shape_text(entry.tensor.shape), "", "not in the model"))
    return done


def convert(model: nn.Module, tensors: Mapping[str, Tensor], *, named: bool) -> dict[str, Entry]:
    """Entries by our keys; `named` says that keys are the published ones."""
    rules = key_map(model) if named else []
    entries: dict[str, Entry] = {}
    for key, tensor in tensors.items():
        ours = to_ours(key, rules)
        entries[ours if ours not in entries else f"{ours}, again"] = Entry(key, tensor)
    for path, layer in model.named_modules():
        if isinstance(layer, Attention):
            regroup(entries, f"{path}." if path else "", layer.layout_name)
    return entries


def in_classifier(model: nn.Module, key: str) -> bool:
    """True where `key` belongs to the classifier, by timm's configuration of the model."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return key.startswith(tuple(f"{name}." for name in ([names] if isinstance(names, str) else names)))


def _place(model: nn.Module, key: str, entry: Entry, target: Tensor, resize: bool, done: Fitted) -> None:
    tensor = entry.tensor
    row = Mismatch(entry.key, shape_text(tensor.shape), shape_text(target.shape), "another shape")
    if tensor.layout != torch.strided or tensor.is_floating_point() != target.is_floating_point():
        kinds = f"{tensor.dtype} for {target.dtype}".replace("torch.", "")
        done.problems.append(row._replace(problem=f"another kind of numbers: {kinds}"))
        return
    if tensor.shape != target.shape and _without_ones(tensor) == _without_ones(target):
        tensor = tensor.reshape(target.shape)  # a 1x1 convolution is a linear map
    fitted = fit_table(model, key, tensor) if tensor.shape != target.shape else None
    if fitted is not None and fitted.tensor.shape == target.shape:
        grids = [shape_text(grid) for grid in (fitted.old, fitted.new)]
        if resize:
            tensor = fitted.tensor
            done.resized.append(f"{entry.key} from {grids[0]} to {grids[1]}")
        else:
            row = row._replace(problem=f"a table of {grids[0]} for {grids[1]}: pass resize=True")
    if tensor.shape == target.shape:
        done.ready[key] = tensor
    else:
        done.problems.append(row)


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def fit_table(model: nn.Module, key: str, table: Tensor) -> FittedTable | None:
    """A position table of another size as its owner resamples it: the innermost module on `key` that knows it."""
    path = key.split(".")
    for depth in range(len(path) - 1, -1, -1):
        owner: Any = model.get_submodule(".".join(path[:depth]))
        name = ".".join(path[depth:])
        fit = getattr(owner, "fit_table", None)
        fitted = fit(name, table) if fit else _fit_of_timm(owner, name, table)
        if fitted is not None:
            return fitted
    return None


def _fit_of_timm(owner: Any, name: str, table: Tensor) -> FittedTable | None:
    """A position table as `fit_table` brings it to timm's own models."""
    if name == "relative_position_bias_table" and table.ndim == 2 and hasattr(owner, "window_size"):
        return fit_bias_table(table, owner.window_size)
    grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)
    if name != "pos_embed" or not grid or table.ndim != 3:
        return None
    prefix = owner.pos_embed.shape[1] - math.prod(grid)  # which has no place on the grid
    if not prefix and math.isqrt(table.shape[1]) ** 2 == table.shape[1] - 1:
        table = table[:, 1:]  # the row of a class token, for a model without one
    side = math.isqrt(max(table.shape[1] - prefix, 0))
    if not side or side * side != table.shape[1] - prefix:
        return None
    return FittedTable(resample_abs_pos_embed(table, list(grid), [side, side], prefix), (side, side), tuple(grid))


def _reason_to_drop(model: nn.Module, key: str, head: bool, pruned: bool) -> str:
    if is_constant(key):
        return "rebuilt"
    if not head and in_classifier(model, key):
        return "head=False"
    return "pruned" if pruned and _is_pruned(model, key) else ""


def _is_pruned(model: nn.Module, key: str) -> bool:
    """True where the stage, block, norm or classifier that `key` belongs to was taken out of the model."""
    if isinstance(model, FeatureGetterNet) and key.startswith("model."):
        return _is_pruned(model.model, key.removeprefix("model."))
    module = model
    for depth, name in enumerate(key.split(".")[:-1]):
        child = dict(module.named_children()).get(name)
        if child is None:
            return depth == 0 or (depth == 1 and name.isdecimal())
        if isinstance(child, nn.Identity):
            return True
        module = child
    return False
