"""The saved state of a run, which may be cut, overwritten or hostile: checked before anything of it is used."""

import json
import math
import pathlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from linsight.errors import CheckpointError
from linsight.recipe import Recipe
from linsight.records import shown
from linsight.tasks import task_of
from linsight.tasks.task import in_row

_LARGEST = 2**28  # bytes of metrics.jsonl
_MOST = 10**12  # no count of a run is larger
_FIGURES = ("lr", "train_loss")  # of a row, beside the measure that decides


def read_state(path: pathlib.Path) -> dict[str, Any]:
    """Read a state.pt; nothing in it is executed.

    What depends on the data and the model is looked at later: `require_within`, `require_weights`, and
    `linsight.train.moments`.

    Raises:
        CheckpointError: it is damaged, or an entry of it is not what a run writes.
    """
    if not path.is_file():
        raise _damaged(path, "it is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged or hostile bytes make the reader raise, and absurd sizes
        raise _damaged(path, shown(str(error) or type(error).__name__, str)) from error
    if not isinstance(state, dict):
        raise _damaged(path, f"it holds a {type(state).__name__}")
    for name, (fits, words) in _ENTRIES.items():
        if name not in state and name not in _LATER:
            raise _damaged(path, f"it has no '{name}'")
        if name in state and not fits(state[name]):
            raise _damaged(path, f"its {name} {shown(_brief(state[name]), str)} is not {words}")
    epoch = state["best"][1]
    if not (1 <= epoch <= state["epoch"] or state["epoch"] == epoch == 0):
        raise _damaged(path, f"its best epoch {epoch} is none of the {state['epoch']} that are done")
    return state


def require_within(state: Mapping[str, Any], epochs: int, steps: int, path: pathlib.Path) -> None:
    """Raise a CheckpointError unless a state is within a run of so many epochs, each of so many steps."""
    epoch, step = state["epoch"], state["step"]
    if epoch > epochs or step > steps or (epoch == epochs and step):
        raise _damaged(path, f"it is after step {step} of epoch {epoch + 1}, and the run has {epochs} of {steps} steps")


def read_rows(path: pathlib.Path, epochs: int, recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of the first `epochs` epochs in a metrics.jsonl; what follows them, a state does not cover.

    Raises:
        CheckpointError: a row is missing, or is not what a run writes.
    """
    if not epochs:
        return []
    if not path.is_file():
        raise _damaged(path, f"there is no such file, and {epochs} epochs are done")
    try:
        if path.stat().st_size > _LARGEST:
            raise _damaged(path, "it is too large")
        lines = path.read_text(encoding="utf-8").splitlines()[:epochs]
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _damaged(path, shown(str(error), str)) from error
    best = in_row(task_of(recipe).best)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not is_count(row.get("epoch")) or row["epoch"] != number:
            raise _damaged(path, f"its line {number} is not of epoch {number}")
        for name in (*_FIGURES, best):
            if not is_number(row.get(name)):
                raise _damaged(path, f"its line {number} has {name}={shown(row.get(name))}, which is no number")
        if bad := [name for name, value in row.items() if not (is_number(value) or isinstance(value, str))]:
            raise _damaged(path, f"its line {number} has {shown(bad[0], str)}={shown(row[bad[0]])}, which is no number")
    if len(rows) < epochs:
        raise _damaged(path, f"it has {len(rows)} lines, and {epochs} epochs are done")
    return rows


def require_weights(given: Any, own: Mapping[str, Any], name: str, source: str) -> None:
    """Raise a CheckpointError unless `given` holds plain tensors of the dtypes of those in `own`.

    Names and shapes are compared where they are loaded. name: of the entry.
    """
    if not isinstance(given, dict):
        raise CheckpointError(f"the {name} of the state in '{source}' is a {type(given).__name__}: it is damaged")
    for key, value in given.items():
        if not isinstance(key, str) or not is_plain(value):
            raise CheckpointError(f"the {name} of the state in '{source}' has {shown(key)}, no tensor: it is damaged")
        if key in own and value.dtype != own[key].dtype:
            kinds = f"{value.dtype}, and the model {own[key].dtype}"
            raise CheckpointError(f"the {name} of the state in '{source}' has '{key}' in {kinds}: it is damaged")


def is_plain(value: Any) -> bool:
    """True for a tensor with values in memory, one after the other."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_nested:
        return False
    return value.device.type != "meta" and not value.is_conj() and not value.is_neg()


def is_number(value: Any) -> bool:
    """True for a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: Any) -> bool:
    """True for a whole number from 0 on, of the size of a count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_list(value: Any, fits: Callable[[Any], bool], count: int | None = None) -> bool:
    return isinstance(value, list) and count in (None, len(value)) and all(map(fits, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_best(value: Any) -> bool:
    return _is_list(value, is_number, 2) and is_count(value[1])


def _is_sums(value: Any) -> bool:
    return _is_list(value, is_number, 5) and is_count(value[1])


def _is_place(value: Any) -> bool:
    """True for the place in a stream: of `linsight.data.random.Batches`."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(is_count(value.get(name)) for name in ("epoch", "step")):
        return False
    lanes = value.get("lanes")
    return isinstance(lanes, dict) and all(is_count(key) and _is_list(lane, is_count) for key, lane in lanes.items())


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (is_count, "a number of epochs"),
    "step": (is_count, "a number of steps"),
    "best": (_is_best, "a measure and its epoch"),
    "sums": (_is_sums, "five sums"),
    "bad": (lambda value: _is_list(value, _is_text), "a list of lines"),
    "place": (_is_place, "a place in a stream"),
    "new": (lambda value: _is_list(value, _is_text), "a list of names"),
    "bad_updates": (lambda value: _is_list(value, is_count, 2), "two counts"),
    "model": (_is_dict, "weights by name"),
    "optimiser": (_is_dict, "the state of an optimiser"),
    "scaler": (_is_dict, "the state of a scaler"),
    "ema": (lambda value: value is None or _is_dict(value), "weights by name"),
}
_LATER: Collection[str] = ("place", "new", "bad_updates")  # runs of before have none


def _brief(value: Any) -> str:
    """A value in few words: what is large is not written out."""
    if isinstance(value, Tensor):
        return f"of {value.dtype} {tuple(value.shape)}"
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
        return f"({type(value).__name__} of {len(value)})"
    return repr(value) if isinstance(value, int | float | str | type(None)) else f"({type(value).__name__})"


def _damaged(path: pathlib.Path, reason: str) -> CheckpointError:
    return CheckpointError(f"'{path}' is damaged: {reason}")
