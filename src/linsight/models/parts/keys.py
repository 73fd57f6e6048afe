"""Keys of the same weights inside and around timm's feature wrappers, for `load_state_dict`."""

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

_FLAT = re.compile(r"(\w+)_(\d+)")


class AnyKeys:
    """A mixin, in front of a module's class: `load_state_dict` takes the keys that a wrapper of timm gives, too.

    These are `layers_0.blocks` of `features_only` for `layers.0.blocks`, and all behind `model.`, or not behind it.
    `names_of_timm` are parts of keys that timm's own class has in the place of ours.
    """

    names_of_timm: ClassVar[Mapping[str, str]] = {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, of a state dict of this model, of what wraps it, or of what it wraps."""
        return super().load_state_dict(in_own_keys(self, state_dict), strict, assign)  # type: ignore[misc,arg-type]


def lists(model: nn.Module) -> set[str]:
    """The names of the lists of stages or blocks of a model, or of one in timm's wrapper."""
    inner = model.get_submodule("model") if "model" in model._modules else model
    return {name for name, part in inner.named_children() if isinstance(part, nn.Sequential | nn.ModuleList)}


def unflattened(key: str, names: Collection[str]) -> str:
    """`key` with `layers.0` for `layers_0`, where `names` has a list called "layers"."""
    found = ((part, _FLAT.fullmatch(part)) for part in key.split("."))
    return ".".join(f"{flat[1]}.{flat[2]}" if flat and flat[1] in names else part for part, flat in found)


def in_own_keys(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """`state` by the keys of `model`, where it has them in another wrapper; itself where it does not."""
    own = {name for of in (model.named_parameters, model.named_buffers) for name, _ in of(remove_duplicate=False)}
    if own.issuperset(state):
        return state
    names, wrapped = lists(model), "model." if "model" in model._modules else ""
    others = getattr(model.get_submodule(wrapped[:-1]), "names_of_timm", {})

    def told(key: str) -> str:
        key = unflattened(key, names)
        return next((key.replace(part, ours) for part, ours in others.items() if part in key), key)

    votes = Counter(way for key in state for way in _ways(told(key), own, wrapped))
    best, (_, second) = [*votes.most_common(2), (("", ""), 0), (("", ""), 0)][:2]
    (off, on), most = best
    if second == most or 2 * most <= min(len(own), len(state)):  # several such models, or another
        return state

    def rename(key: str) -> str:
        plain = told(key)
        return on + plain.removeprefix(off) if plain.startswith(off) and plain not in own else plain

    renamed = OrderedDict((rename(key), value) for key, value in state.items())
    if hasattr(state, "_metadata"):
        renamed._metadata = _metadata(state._metadata, rename)  # type: ignore[attr-defined]
    return renamed


def _ways(key: str, own: Collection[str], wrapped: str) -> Iterator[tuple[str, str]]:
    """The ways to one of the keys `own`: up to six modules taken off the front of `key`, and the wrapper put on."""
    for cut in [0, *(i + 1 for i, char in enumerate(key) if char == ".")][:7]:
        if key[cut:] in own:
            yield key[:cut], ""
        if wrapped and not key[:cut].endswith(wrapped) and wrapped + key[cut:] in own:
            yield key[:cut], wrapped


def _metadata(told: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """The notes of a state dict on each module, by the renamed paths of these; those further inside come last."""
    found = {}
    for path, about in told.items():
        key = rename(f"{path}.x" if path else "x")
        found[key.removesuffix("x").rstrip(".")] = about
    return found
