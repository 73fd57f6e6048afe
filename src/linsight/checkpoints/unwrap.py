"""From what a file holds to the state dict in it: wrappers of training scripts, prefixes of wrapped modules."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from linsight.attention.on_grid import GRIDS
from linsight.errors import CheckpointError
from linsight.models.parts.keys import lists, unflattened

PLAIN = ("model", "state_dict", "model_state_dict", "module", "net")
EMA = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "_backbone.", "timm_model.")
IMG_SIZE = "img_size"  # beside `GRIDS` in the metadata of a state dict: height and width of images
# Modules around modules, wherever they are: torch.compile, FSDP, activation checkpoints.
_AROUND = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Unwrapped(NamedTuple):
    """A state dict out of its wrappers.

    tensors: by their published keys.  wrapper: the entries they were under.  others: entries that are no tensor.
    tables: the grids of tables, by those keys.  size: height and width of images.  Both as the file tells them.
    """

    tensors: dict[str, Tensor]
    wrapper: str
    others: tuple[str, ...]
    tables: Mapping[str, tuple[int, int]] = MappingProxyType({})
    size: tuple[int, int] | None = None


def unwrap(content: Mapping[str, Any], source: str, *, ema: bool | None, prefer_ema: bool = False) -> Unwrapped:
    """The state dict in `content`, without prefixes that all keys share.

    ema: True for the averaged weights, False for the trained ones; None for what `prefer_ema` says, or the other.

    Raises:
        CheckpointError: there are no weights, or not the asked ones.
    """
    path: list[str] = []
    averaged, whole = False, content
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
        raise CheckpointError(f"{source} holds no weights {_instead(content)}")
    others = tuple(str(key) for key in content if key not in tensors)
    clean = {unwrapped_key(key): value for key, value in tensors.items()}
    prefix = shared_prefix(clean)
    tables, size = _told(getattr(content, "_metadata", None))
    return Unwrapped(
        {key.removeprefix(prefix): value for key, value in clean.items()},
        ".".join(path),
        others,
        {unwrapped_key(key).removeprefix(prefix): grid for key, grid in tables.items()},
        size or _size_in(whole),
    )


def _instead(content: Mapping[str, Any]) -> str:
    """The rest of the line for a file without weights: what it holds in their place."""
    if "param_groups" in content or "optimizer" in content or "optimizer_state_dict" in content:
        return "but the state of an optimiser: its entries are: " + _named(content) + "; take the file of the model"
    nested = [key for key, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
    way = f"; pass one of them, as torch.load(path)['{nested[0]}']" if nested else ""
    return f"under {', '.join(PLAIN + EMA)}; its entries are: {_named(content)}{way}"


def _named(content: Iterable[Any]) -> str:
    return ", ".join(map(str, list(content)[:8])) or "none"


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def table_grids(state: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The height and width of the grid of each position table, by its key, as a state dict of linsight tells them."""
    return _told(getattr(state, "_metadata", None))[0]


def _told(metadata: Any) -> tuple[dict[str, tuple[int, int]], tuple[int, int] | None]:
    """The grids of tables and the size of images in the metadata of a state dict, whoever wrote it."""
    tables: dict[str, tuple[int, int]] = {}
    size = None
    for path, about in metadata.items() if isinstance(metadata, Mapping) else ():
        if isinstance(path, str) and isinstance(about, Mapping):
            grids = about.get(GRIDS)
            for name, grid in grids.items() if isinstance(grids, Mapping) else ():
                sides = as_sides(grid)
                if sides is not None:
                    tables[f"{path}.{name}" if path else str(name)] = sides
            size = size or as_sides(about.get(IMG_SIZE))
    return tables, size


def _size_in(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of images in the record of a training script that is kept beside the weights."""
    args, config = (content.get(name) for name in ("args", "config"))
    data = config.get("DATA") if isinstance(config, Mapping) else None
    for record, name in ((args, "input_size"), (args, "img_size"), (data, "IMG_SIZE")):
        if isinstance(record, Mapping):
            value = {**record, **vars(record)}.get(name) if hasattr(record, "__dict__") else record.get(name)
            sides = as_sides(value[-2:] if isinstance(value, list | tuple) else value)
            if sides is not None:
                return sides
    return None


def as_sides(value: Any) -> tuple[int, int] | None:
    """One or two whole numbers above 0 as height and width; None for all else, so that records of others may be odd."""
    sides = [value, value] if isinstance(value, int) else value
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        return None
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return None
    return sides[0], sides[1]


def unwrapped_key(key: str) -> str:
    """`key` without the modules that compilation, FSDP and activation checkpoints put around others."""
    return _AROUND.sub("", key)


def clean_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model`, by the keys that it has without such modules."""
    return {unwrapped_key(key): tensor for key, tensor in model.state_dict().items()}


def in_lists(found: Unwrapped, model: nn.Module) -> Unwrapped:
    """A file whose keys have the lists of `model` as lists: `layers.0` for the `layers_0` of timm's `features_only`."""
    names = lists(model)
    tensors = {unflattened(key, names): tensor for key, tensor in found.tensors.items()}
    return found._replace(tensors=tensors, tables={unflattened(key, names): grid for key, grid in found.tables.items()})


def beneath(found: Unwrapped, wanted: Collection[str], source: str) -> tuple[Unwrapped, tuple[str, ...]]:
    """The part of a file that a model of the keys `wanted` is from, and the keys of what is beside it.

    Detectors have other parts beside their backbone, training scripts a loss, averages a counter.

    Raises:
        CheckpointError: there are several such models in it.
    """
    votes = Counter(prefix for key in found.tensors for prefix, rest in _splits(key) if rest in wanted)
    (best, most), *others = [*votes.most_common(), ("", 0)]
    if not best or 10 * votes[""] > most or 3 * most < len(wanted):
        return found, ()
    equal = sorted([best, *(prefix for prefix, count in others if count == most)])
    if len(equal) > 1:
        raise CheckpointError(
            f"{source} holds several such models, under {_named(equal)}: pass one, as "
            f"{{key.removeprefix({best!r}): value for key, value in state.items() if key.startswith({best!r})}}"
        )
    inside = {key: key.removeprefix(best) for key in found.tensors if key.startswith(best)}
    beside = tuple(key for key in found.tensors if key not in inside)
    tables = {key.removeprefix(best): grid for key, grid in found.tables.items() if key.startswith(best)}
    wrapper = ".".join(filter(None, [found.wrapper, best.rstrip(".")]))
    return found._replace(
        tensors={new: found.tensors[key] for key, new in inside.items()}, wrapper=wrapper, tables=tables
    ), beside


def _splits(key: str) -> Iterable[tuple[str, str]]:
    """`key` itself, and the ways to take up to six modules off its front."""
    yield "", key
    for dot in [i for i, char in enumerate(key) if char == "."][:6]:
        yield key[: dot + 1], key[dot + 1 :]


def shared_prefix(keys: Collection[str]) -> str:
    """The prefixes of `PREFIXES`, one after the other, that every key has."""
    prefix = ""
    while True:
        longer = next((prefix + p for p in PREFIXES if all(key.startswith(prefix + p) for key in keys)), None)
        if longer is None or not keys:
            return prefix
        prefix = longer
