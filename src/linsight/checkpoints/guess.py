"""A guess, in one line, of what a checkpoint is that does not fit."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from linsight.models import ARCHITECTURES, HOSTS, VARIANTS, Architecture, Host, create_model

from ._fit import UNTOLD, Fitted, fit, in_classifier
from ._grids import Made
from ._stem import stem_clue
from .keys import key_map, to_ours
from .report import Mismatch

# How tensors are filled, by nn.init and timm.
FILLING = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")


def describe(model: nn.Module, tensors: Mapping[str, Tensor], fitted: Fitted, made: Made) -> str:
    """How much does not fit, why, and which model it is from."""
    rows, rules = fitted.problems, key_map(model)
    heads = [row for row in rows if in_classifier(model, row.key) or in_classifier(model, to_ours(row.key, rules))]
    clues = [
        f"{len(rows)} of {len(rows) + len(fitted.ready)} tensors differ",
        *_head_clues(heads),
        *_table_clues(model, rows),
    ]
    if len(heads) < len(rows):
        vectors = [row for row in rows if row.checkpoint.isdecimal() and row.model.isdecimal() and row not in heads]
        if vectors:
            given, wanted = Counter((row.checkpoint, row.model) for row in vectors).most_common(1)[0][0]
            clues.append(f"width {given} in the checkpoint, {wanted} in the model")
        # Few that differ are another fault.
        name = guess(model, tensors, made) if len(rows) > len(fitted.ready) / 10 else ""
        if name:
            clues.append(f"it fits '{name}'")
        if any(key.endswith(("_orig", "_mask")) or "parametrizations." in key for key in _missing(rows)):
            clues.append("the model is pruned or parametrized: load weights before that")
        elif len(fitted.ready) >= len(rows) and any(row.problem != UNTOLD and row not in heads for row in rows):
            clues.append(f"strict=False loads the {len(fitted.ready)} that fit")
    return "; ".join(clues)


def _missing(rows: list[Mismatch]) -> Iterator[str]:
    """The keys of the model that the checkpoint lacks."""
    return (row.key for row in rows if not row.checkpoint)


def _head_clues(heads: list[Mismatch]) -> list[str]:
    """A line on the classifier, if its number of classes is what is wrong."""
    if not heads:
        return []
    way = "pass head=False to leave the head of the model as it is"
    given, wanted = (shape.partition("x")[0] for shape in heads[0][1:3])
    if not (given and wanted):
        return [f"{'the model' if given else 'the checkpoint'} has no head: {way}"]
    return [] if given == wanted else [f"{given} classes in the checkpoint, {wanted} in the model: {way}"]


def _table_clues(model: nn.Module, rows: list[Mismatch]) -> Iterator[str]:
    """The way out for tables of an unknown grid, and for the first convolution."""
    untold = sum(row.problem == UNTOLD for row in rows)
    if untold:
        size = ["from_size=(height, width) of the images"] if hasattr(model, "set_input_size") else []
        ways = ", or ".join([*size, "from_grid=(height, width) in tokens"])
        tables = "a position table lies on a grid" if untold == 1 else f"{untold} position tables lie on grids"
        yield f"{tables} that the file does not tell: pass {ways}, that it was made for"
    rules = key_map(model)
    yield from filter(None, (stem_clue(model, to_ours(row.key, rules), *row[1:3]) for row in rows))


def guess(model: nn.Module, tensors: Mapping[str, Tensor], made: Made) -> str:
    """A registered model that the checkpoint fits, but for its head, best without a resized table; empty if none."""
    config = getattr(model, "pretrained_cfg", None)
    if not config:  # a single layer
        return ""
    resized, strangers = "", set[type[nn.Module]]()
    for row in _candidates(tensors):
        if row.name != config.get("architecture") and row.model_cls not in strangers:
            with _Unfilled():
                candidate = create_model(row.name, device="meta")
            fitted = fit(candidate, tensors, head=False, made=made)
            if fitted.ready and not fitted.problems:
                if not fitted.resized:
                    return row.name
                resized = resized or row.name
            elif not fitted.ready and all(not (wrong.checkpoint and wrong.model) for wrong in fitted.problems):
                strangers.add(row.model_cls)  # not a name in common
    return resized


class _Registered(NamedTuple):
    """A registered model: its class, arguments and number of parameters, 0 where it is not told."""

    name: str
    model_cls: type[nn.Module]
    args: Mapping[str, Any]
    params: int


def _candidates(tensors: Mapping[str, Tensor]) -> list[_Registered]:
    """Registered models of the width and depth that keys and shapes tell, since to build each takes long.

    Those with about as many parameters come first, then those that do not tell how many they have.
    """
    vectors = {len(tensor) for tensor in tensors.values() if tensor.ndim == 1}
    blocks = len({found[1] for key in tensors if (found := _IN_BLOCK.match(key))})
    numbers = sum(tensor.numel() for tensor in tensors.values())
    fitting = []
    for row in _registered():
        width, depth = size_of(row.args)
        if width in (None, *vectors) and (not blocks or depth in (None, blocks)):
            fitting.append(row)
    return sorted(fitting, key=lambda row: abs(math.log(numbers / row.params)) if row.params else 0.5)


# Every block of a transformer has it, by this name or as in "pre_norm2"; norms of stages lie in no block.
_IN_BLOCK = re.compile(r"(.+)\.\w*norm2\.weight$")


def _registered() -> Iterator[_Registered]:
    for name, variant in VARIANTS.items():
        host = HOSTS[variant.host]
        args, params = {**host.args, **variant.args}, variant.published.get("params", 0)
        yield _Registered(name, host.model_cls, args, params)
    entries: Mapping[str, Host | Architecture] = {**HOSTS, **ARCHITECTURES}
    for name, entry in entries.items():
        yield _Registered(name, entry.model_cls, entry.args, entry.published.get("params", 0))


def size_of(args: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The width of the first stage and the number of blocks, by the arguments of a model; None if they are silent."""
    stages = args.get("stages", ())
    if stages and not isinstance(stages[0], tuple):  # the steps of a ResNet, whose blocks are no transformer's
        return None, None
    widths = args.get("embed_dims", args.get("embed_dim", [dim for dim, *_ in stages]))
    depths = args.get("depths", args.get("depth", [depth for _, depth, *_ in stages]))
    if "steps" in args:
        depths = [depth for _, depth in _pairs(args["steps"])]
    widths, depths = ([sides] if isinstance(sides, int) else sides for sides in (widths, depths))
    return next(iter(widths), None), sum(depths) or None


def _pairs(steps: Any) -> Iterator[tuple[int, int]]:
    """The pairs (width, number of blocks) of StepsNet, listed by stage or not."""
    for step in steps:
        if isinstance(step[0], int):
            yield step
        else:
            yield from step


class _Unfilled(TorchFunctionMode):
    """Leaves tensors of the meta device as they are: there is nothing to fill, and to pretend takes most of a build."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in FILLING and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
