"""What a checkpoint that does not fit seems to be, in one line."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from linsight.models import HOSTS, VARIANTS, create_model

from ._fit import Fitted, fit, in_classifier
from ._keys import key_map, to_ours
from ._report import Mismatch

# How tensors are filled, by nn.init and timm.
FILLING = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")


def describe(model: nn.Module, tensors: Mapping[str, Tensor], fitted: Fitted) -> str:
    """How much does not fit, why, and which model it is from."""
    rows, rules = fitted.problems, key_map(model)
    heads = [row for row in rows if in_classifier(model, row.key) or in_classifier(model, to_ours(row.key, rules))]
    clues = [f"{len(rows)} of {len(rows) + len(fitted.ready)} tensors differ", *_head_clues(heads)]
    if len(heads) < len(rows):
        vectors = [row for row in rows if row.checkpoint.isdecimal() and row.model.isdecimal() and row not in heads]
        if vectors:
            given, wanted = Counter((row.checkpoint, row.model) for row in vectors).most_common(1)[0][0]
            clues.append(f"width {given} in the checkpoint, {wanted} in the model")
        # Few that differ are another fault.
        name = guess(model, tensors) if len(rows) > len(fitted.ready) / 10 else ""
        if name:
            clues.append(f"it fits '{name}'")
    return "; ".join(clues)


def _head_clues(heads: list[Mismatch]) -> list[str]:
    """What is wrong with the classifier, if it is the number of classes."""
    if not heads:
        return []
    way = "pass head=False to leave the head of the model as it is"
    given, wanted = (shape.partition("x")[0] for shape in heads[0][1:3])
    if not (given and wanted):
        return [f"{'the model' if given else 'the checkpoint'} has no head: {way}"]
    return [] if given == wanted else [f"{given} classes in the checkpoint, {wanted} in the model: {way}"]


def guess(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """A registered model that the checkpoint fits, but for its head, best without a resized table; empty if none."""
    config = getattr(model, "pretrained_cfg", None)
    if not config:  # a single layer
        return ""
    resized = ""
    for name in _candidates(tensors):
        if name != config.get("architecture"):
            with _Unfilled():
                candidate = create_model(name, device="meta")
            fitted = fit(candidate, tensors, head=False)
            if fitted.ready and not fitted.problems:
                if not fitted.resized:
                    return name
                resized = resized or name
    return resized


def _candidates(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Registered models of the width and depth that the keys and shapes tell, since to build each takes long."""
    vectors = {len(tensor) for tensor in tensors.values() if tensor.ndim == 1}
    blocks = sum(key.endswith(".norm1.weight") for key in tensors)  # none where mechanisms are whole blocks
    registered = [(name, {**HOSTS[variant.host].args, **variant.args}) for name, variant in VARIANTS.items()]
    for name, args in [*registered, *((name, host.args) for name, host in HOSTS.items())]:
        width, depth = _size(args)
        if width in (None, *vectors) and (not blocks or depth in (None, blocks)):
            yield name


def _size(args: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The width of the first stage and the number of blocks, by the arguments of a model; None if they are silent."""
    stages = args.get("stages", ())
    widths = args.get("embed_dims", args.get("embed_dim", [dim for dim, *_ in stages]))
    depths = args.get("depths", args.get("depth", [depth for _, depth, *_ in stages]))
    widths, depths = ([sides] if isinstance(sides, int) else sides for sides in (widths, depths))
    return next(iter(widths), None), sum(depths) or None


class _Unfilled(TorchFunctionMode):
    """Leaves tensors of the meta device as they are: there is nothing to fill, and to pretend takes most of a build."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in FILLING and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
