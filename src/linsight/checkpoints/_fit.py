"""Where the tensors of a checkpoint go in a model; nothing is copied here."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from linsight.attention import Attention

from ._grids import Grids, Made
from ._projections import Entry, regroup, share
from ._stem import adapt_stem
from .keys import copies, is_constant, key_map, to_ours
from .report import Mismatch, shape_text
from .unwrap import clean_state, unwrapped_key

UNTOLD = "on which grid it lies is not told"
_UNTOLD = Made()


@dataclasses.dataclass
class Fitted:
    """A checkpoint matched with a model. ready: tensors by our keys, in its shapes.  The rest as in `LoadReport`."""

    ready: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    resized: list[str] = dataclasses.field(default_factory=list)
    dropped: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    problems: list[Mismatch] = dataclasses.field(default_factory=list)
    adapted: list[str] = dataclasses.field(default_factory=list)


def fit(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    head: bool = True,
    resize: bool = True,
    pruned: bool = False,
    made: Made = _UNTOLD,
) -> Fitted:
    """Match `tensors`, by published keys or ours, with the state of `model`.

    head: False leaves the classifier alone.  resize: resample position tables.  pruned: the model lacks
    modules on purpose, as timm's `features_only` makes it.  made: what is known of the grids of tables in the file.
    """
    grids = Grids(model, made)
    own = clean_state(model)
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
            _place(grids, key, entry, target, resize, done)
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
    for one, keys in copies(model).items():
        if one in entries and keys:
            entries |= dict.fromkeys(keys, entries.pop(one))
    for path, layer in model.named_modules():
        if isinstance(layer, Attention):
            prefix = unwrapped_key(f"{path}.") if path else ""
            regroup(entries, prefix, layer.layout_name, layer.num_heads)
        for pattern in getattr(layer, "in_parts", ()):
            names = dict(layer.named_parameters()).keys()
            count = sum(pattern.format(i) in names for i in range(len(names)))
            share(entries, unwrapped_key(f"{path}.") + pattern if path else pattern, count)
    return entries


def in_classifier(model: nn.Module, key: str) -> bool:
    """True where `key` belongs to the classifier, by timm's configuration of the model."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return key.startswith(tuple(f"{name}." for name in ([names] if isinstance(names, str) else names)))


def _place(grids: Grids, key: str, entry: Entry, target: Tensor, resize: bool, done: Fitted) -> None:
    tensor = entry.tensor
    row = Mismatch(entry.key, shape_text(tensor.shape), shape_text(target.shape), "another shape")
    if _counts(tensor, target):
        tensor = tensor.to(target.dtype)
    if tensor.layout != torch.strided or tensor.is_floating_point() != target.is_floating_point():
        kinds = f"{tensor.dtype} for {target.dtype}".replace("torch.", "")
        done.problems.append(row._replace(problem=f"another kind of numbers: {kinds}"))
        return
    if tensor.shape != target.shape and _without_ones(tensor) == _without_ones(target):
        tensor = tensor.reshape(target.shape)  # a 1x1 convolution is a linear map
    adapted = adapt_stem(grids.model, key, tensor, target)
    if adapted is not None:
        tensor, how = adapted
        done.adapted.append(f"{entry.key} {how}")
    elif grids.own(key) is not None or tensor.shape != target.shape:
        tensor, problem = _table(grids, key, entry.key, tensor, target, resize, done)
        if problem:
            done.problems.append(row._replace(problem=problem))
            return
    if tensor.shape == target.shape:
        done.ready[key] = tensor
    else:
        done.problems.append(row)


def _counts(tensor: Tensor, target: Tensor) -> bool:
    """True for one whole number kept as a float: where a checkpoint was halved, its counts of batches are, too."""
    if tensor.layout != torch.strided or tensor.numel() != 1 or not tensor.is_floating_point():
        return False
    return not target.is_floating_point() and float(tensor).is_integer()


def _table(
    grids: Grids, key: str, source: str, tensor: Tensor, target: Tensor, resize: bool, done: Fitted
) -> tuple[Tensor, str]:
    """A position table on the grid of the model, or else itself and what is wrong with it, if that is known."""
    own, old = grids.own(key), None
    if own is not None:
        old = grids.old(key, source, tensor)
        if old is None:
            alike = [shape[:-2] + shape[-1:] for shape in (tensor.shape, target.shape)]  # but for the rows
            if tensor.ndim != target.ndim or alike[0] != alike[1]:
                return tensor, ""
            more = abs(tensor.shape[-2] - target.shape[-2])
            return tensor, "another number of prefix tokens" if 0 < more < 3 and math.prod(own) > 3 else UNTOLD
    fitted = grids.fit(key, tensor, old)
    if fitted is None or fitted.tensor.shape != target.shape:
        if fitted is not None:
            return tensor, ""
        told = f"its rows are not those of {shape_text(old)}, as told" if old and old != own else ""
        return tensor, told
    if fitted.old != fitted.new:
        line = f"{shape_text(fitted.old)} to {shape_text(fitted.new)}"
        if not resize:
            return tensor, f"a table of {line.replace(' to ', ' for ')}: pass resize=True"
        done.resized.append(f"{source} from {line}")
    return fitted.tensor, ""


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


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
