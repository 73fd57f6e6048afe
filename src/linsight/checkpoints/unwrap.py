"""From what a file holds to the state dict in it: wrappers of training scripts, prefixes of wrapped modules."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from linsight.errors import CheckpointError

PLAIN = ("model", "state_dict", "model_state_dict", "module", "net")
EMA = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")


class Unwrapped(NamedTuple):
    """A state dict out of its wrappers.

    tensors: by their published keys.  wrapper: the entries they were under.  others: entries that are no tensor.
    """

    tensors: dict[str, Tensor]
    wrapper: str
    others: tuple[str, ...]


def unwrap(content: Mapping[str, Any], source: str, *, ema: bool | None, prefer_ema: bool = False) -> Unwrapped:
    """The state dict in `content`, without prefixes that all keys share.

    ema: True for the averaged weights, False for the trained ones; None for what `prefer_ema` says, or the other.

    Raises:
        CheckpointError: there are no weights, or not the asked ones.
    """
    path: list[str] = []
    averaged = False
    while True:
        inner = {key: value for key, value in content.items() if isinstance(value, Mapping)}
        plain = next((key for key in PLAIN if key in inner), None)
        average = None if averaged else next((key for key in EMA if key in inner), None)
        wanted = prefer_ema if ema is None else ema
        name = (average or plain) if wanted else (plain or average)
        if name is None:
            break
        averaged = averaged or name == average
        path.append(name)
        content = inner[name]
    if ema is not None and ema != averaged:
        kind, way = ("averaged (EMA)", "ema=False") if ema else ("trained", "ema=True")
        raise CheckpointError(f"{source} holds no {kind} weights: pass {way}, or leave ema= out")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        entries = ", ".join(map(str, list(content)[:8])) or "none"
        raise CheckpointError(f"{source} holds no weights under {', '.join(PLAIN + EMA)}; its entries are: {entries}")
    others = tuple(str(key) for key in content if key not in tensors)
    prefix = shared_prefix(tensors)
    return Unwrapped({key.removeprefix(prefix): value for key, value in tensors.items()}, ".".join(path), others)


def shared_prefix(keys: Collection[str]) -> str:
    """The prefixes of `PREFIXES`, one after the other, that every key has."""
    prefix = ""
    while True:
        longer = next((prefix + p for p in PREFIXES if all(key.startswith(prefix + p) for key in keys)), None)
        if longer is None or not keys:
            return prefix
        prefix = longer
