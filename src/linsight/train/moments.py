"""The saved state of an optimiser and of a scaler, checked against the ones that are to take it up."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linsight.errors import CheckpointError
from linsight.records import shown

from .state import is_count, is_number, is_plain


def fitting(state: Mapping[str, Any], optimiser: torch.optim.Optimizer, source: str) -> dict[str, Any]:
    """A saved state as `optimiser` can take it up; options that an earlier version did not know are its own.

    Raises:
        CheckpointError: it is of another optimiser, or damaged.
    """
    own, after = optimiser.state_dict()["param_groups"], _stepped(optimiser)
    groups, kept = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(kept, dict) or len(groups) != len(own):
        raise _other(source, "it has other groups of parameters")
    for number, (group, model) in enumerate(zip(groups, after.state_dict()["param_groups"], strict=True)):
        _check_group(group, model, f"group {number}", source)
    _check_kept(kept, after, source)
    return {**state, "param_groups": [{**mine, **group} for mine, group in zip(own, groups, strict=True)]}


def require_scale(state: Mapping[str, Any], scaler: torch.amp.GradScaler, source: str) -> None:
    """Raise a CheckpointError unless a saved state is one that `scaler` can take up."""
    own = scaler.state_dict()
    if not own:
        return
    for name in own:
        value: Any = state.get(name)
        if not is_number(value) or not 0 <= value <= 1e38 or (name != "_growth_tracker" and not value):
            raise _other(source, f"the scaler has {name}={shown(value)}")
        if isinstance(own[name], int) and not is_count(value):
            raise _other(source, f"the scaler has {name}={shown(value)}")


def _check_group(given: Any, own: Mapping[str, Any], name: str, source: str) -> None:
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise _other(source, f"{name} is no group of parameters")
    if given.get("params") != own["params"] or any(type(place) is not int for place in given["params"]):
        raise _other(source, f"{name} has other parameters")
    for key, value in given.items():
        if key == "params":
            continue
        if key not in own:
            raise _other(source, f"{name} has {shown(key, str)}, which it does not know")
        if not (is_step(value) if key == "step" else _alike(value, own[key])):
            raise _other(source, f"{name} has {key}={shown(value)}")


def _alike(value: Any, own: Any) -> bool:
    """True for two options of one kind, where a number, as a rate, may be another one, and all else is the same."""
    if isinstance(own, bool) or own is None or isinstance(own, str):
        return type(value) is type(own) and value == own
    if isinstance(own, Tensor):
        return is_plain(value) and value.shape == own.shape and bool(value.isfinite().all())
    if isinstance(own, int | float):
        return is_number(value)
    if isinstance(own, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(own)
            and all(is_number(one) == is_number(other) and one == other for one, other in zip(value, own, strict=True))
        )
    return type(value) is type(own)


def is_step(value: Any) -> bool:
    """True for a count of updates, which is a whole number, some optimisers' as a tensor."""
    if isinstance(value, Tensor):
        if not is_plain(value) or value.dim() or value.is_complex():
            return False
        value = value.item()
    return is_number(value) and 0 <= value <= 1e12 and value == int(value)


def _check_kept(kept: Mapping[Any, Any], after: torch.optim.Optimizer, source: str) -> None:
    parameters = [parameter for group in after.param_groups for parameter in group["params"]]
    for place, found in kept.items():
        if type(place) is not int or not 0 <= place < len(parameters) or not isinstance(found, dict):
            raise _other(source, f"it has a state of parameter {shown(place)}, of which there is none")
        own = after.state.get(parameters[place], {})
        if found.keys() != own.keys():
            odd = sorted(map(str, found.keys() ^ own.keys()))[0]
            raise _other(source, f"the state of parameter {place} differs by {shown(odd, str)}")
        for name, value in found.items():
            if not (is_step(value) if name == "step" else _fits(value, own[name])):
                raise _other(source, f"the state of parameter {place} has another {shown(name, str)}")


def _fits(value: Any, own: Any) -> bool:
    """True for a value of a state that may stand where an optimiser of this kind has `own` after a step."""
    if (isinstance(own, Tensor) and own.dim() == 0) or (isinstance(own, int | float) and not isinstance(own, bool)):
        if isinstance(value, Tensor):  # a count of steps, which some versions keep as a tensor and some as a number
            return is_plain(value) and value.dim() == 0 and not value.is_complex() and is_number(value.item())
        return is_number(value)
    if isinstance(own, Tensor):
        return is_plain(value) and value.shape == own.shape and value.dtype == own.dtype
    if isinstance(own, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(own)
        return fits and all(_fits(one, other) for one, other in zip(value, own, strict=True))
    return type(value) is type(own) and (isinstance(own, dict) or value == own)


def _stepped(optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy of `optimiser` after one step, with all that it keeps then; `optimiser` is left as it is."""
    copied = copy.deepcopy(optimiser)
    for group in copied.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    copied.step()
    return copied


def _other(source: str, reason: str) -> CheckpointError:
    return CheckpointError(f"the state in '{source}' is of another optimiser, or damaged: {reason}")
