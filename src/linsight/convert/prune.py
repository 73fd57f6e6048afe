"""DiMaP: a hierarchical vision transformer pruned by its weights alone, without data.

"Data-independent Module-Aware Pruning", ICLR 2024. Weights that do the same work are ranked together, over all stages:
all projections to queries, keys and values ("qkv"), all output projections ("proj"), all MLPs ("mlp"). Layers of other
sizes and scales are compared by

    imp(w) = w^2 / sum of w'^2 over the weights of its layer that are not smaller in magnitude, w itself among them

the share of w in what is left of its layer when all below it are gone. The largest weight of a layer has 1, so no layer
is ever emptied. (Over those not larger it would be the smallest that has 1, and the largest would be pruned first.) The
weights of least importance become zeros; tensors keep their shapes. Patch embedding, merging and classifier are left as
they are: "aux", the first two, is pruned where it is asked for.

The authors then train for 30 epochs at a rate of 2e-5, down to 2e-7, 15 of them warm-up from 2e-8, with a weight decay
of 1e-8: Swin-B, 83.48 % top-1, has 83.52, 83.43 and 83.28 with 14, 33 and 53 % of its operations gone.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from linsight.errors import LinsightError, UnknownNameError

KINDS = ("qkv", "proj", "mlp", "aux")
_AUX = {"patch_embed", "downsample", "stem"}
_ATTENTION = {"attn", "attention"}
_QKV = {"qkv", "q", "k", "v", "qk", "kv", "q_proj", "k_proj", "v_proj"}


class Mask(nn.Module):
    """A parametrization of a weight: those that are not `kept` are 0, and stay so when the others are trained."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the layer sees it."""
        return weight * self.kept

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A weight that is set is taken as it is."""
        return weight


@dataclasses.dataclass(frozen=True)
class PrunedKind:
    """The layers of one kind, their weights, and how many of those are 0."""

    kind: str
    layers: int
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.weights


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """The outcome of pruning a model.

    macs: multiply-adds of matrix products and convolutions for one image, before.  saved: those of them whose weight is
    0 now. Both are None where no image size is known.
    """

    kinds: tuple[PrunedKind, ...]
    macs: int | None
    saved: int | None

    @property
    def macs_left(self) -> float | None:
        """The share of multiply-adds whose weight is not 0."""
        return None if self.macs is None or self.saved is None else 1 - self.saved / self.macs

    def __str__(self) -> str:
        lines = [f"{'kind':<6}{'layers':>7}{'weights':>13}{'zeros':>13}{'sparsity':>10}"]
        for row in self.kinds:
            lines.append(f"{row.kind:<6}{row.layers:>7}{row.weights:>13,}{row.zeros:>13,}{row.sparsity:>10.1%}")
        if self.macs is not None and self.macs_left is not None:
            lines.append(f"multiply-adds left: {self.macs_left:.1%} of {self.macs / 1e9:.2f} G for one image")
        return "\n".join(lines)


def prune(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    modules: Sequence[str] = ("qkv", "proj", "mlp"),
    input_size: tuple[int, int, int] | None = None,
) -> PruneReport:
    """Set the share `ratio` of the weights of each kind to 0, in place, by a mask that training keeps.

    Of equally important weights the first are pruned. What was pruned before stays so. `make_permanent` removes the
    masks: until then the state dict has them, beside the weights.

    Args:
        model: with blocks of `attn` and `mlp`, as Swin, PVT and ViT have them, of timm and of linsight.
        modules: the kinds, of "qkv", "proj", "mlp" and "aux", each for itself.
        input_size: channels, height and width of an image, for the report; as the model tells, if None.

    Raises:
        UnknownNameError: no such kind.
        LinsightError: a ratio that is not below 1, a kind of which there is no layer, weights that are no numbers.
    """
    if not 0 <= ratio < 1:
        raise LinsightError(f"ratio={ratio} must be from 0 to below 1: the share of weights that are to be 0")
    kinds = _chosen(model, [modules] if isinstance(modules, str) else modules)
    macs, uses = _count(model, input_size)
    rows, saved = [], 0
    for kind, layers in kinds.items():
        zeros = 0
        for (name, layer), kept in zip(layers.items(), _kept(layers, ratio), strict=True):
            gone = _mask(layer, kept)
            zeros += gone
            saved += gone * uses.get(name, 0)
        weights = sum(layer.weight.numel() for layer in layers.values())
        rows.append(PrunedKind(kind, len(layers), weights, zeros))
    seen = macs is not None and all(name in uses for layers in kinds.values() for name in layers)
    return PruneReport(tuple(rows), macs if seen else None, saved if seen else None)


def make_permanent(model: nn.Module) -> list[str]:
    """Put the zeros into the weights of a pruned model, and remove its masks; the names of the layers."""
    found = {name: layer for name, layer in model.named_modules() if _masked(layer) is not None}
    for layer in found.values():
        # torch takes the parametrized weight off the class, which it made for the layer, but copies of the layer share
        kind = type(layer)
        own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        layer.__class__ = type(kind.__name__, kind.__bases__, own)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return list(found)


def importance(weight: Tensor) -> Tensor:
    """The importance of each weight of a layer, in float64: see the module. Weights of 0 have 0."""
    ordered, places = weight.detach().abs().flatten().sort()
    squares = ordered.double().square()
    left = squares.flip(0).cumsum(0).flip(0)  # the sum of each and all behind it
    first = torch.ones_like(places, dtype=torch.bool)
    first[1:] = ordered[1:] > ordered[:-1]
    starts = torch.arange(len(places), device=places.device).masked_fill(~first, 0).cummax(0).values
    left = left[starts]  # of equal ones, that of the first
    share = squares / left.masked_fill(left == 0, 1)
    return torch.empty_like(share).scatter_(0, places, share).view_as(weight)


def kind_of(name: str, module: nn.Module) -> str:
    """The kind of a layer by its name: "qkv", "proj", "mlp" or "aux"; "" for those that are never pruned."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return ""
    parts = name.split(".")
    if _AUX & set(parts):
        return "aux"
    if "mlp" in parts and module.weight[0, 0].numel() == 1 and getattr(module, "groups", 1) == 1:
        return "mlp"
    if len(parts) < 2 or parts[-2] not in _ATTENTION:
        return ""
    return "qkv" if parts[-1] in _QKV else "proj" if parts[-1] == "proj" else ""


def _chosen(model: nn.Module, modules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The layers of each kind, by name."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for name, module in model.named_modules():
        kind = kind_of(name, module)
        if kind:
            found[kind][name] = module
    for kind in modules:
        if kind not in KINDS:
            raise UnknownNameError("kind of layers to prune", kind, KINDS)
        if not found[kind]:
            known = ", ".join(kind for kind in KINDS if found[kind])
            raise LinsightError(
                f"{type(model).__name__} has no layers of the kind '{kind}': "
                + (f"it has {known}" if known else "what is pruned are the Linear layers of its `attn` and `mlp`")
            )
        for name, layer in found[kind].items():
            if layer.weight.is_meta or not bool(layer.weight.isfinite().all()):
                raise LinsightError(f"{name} has weights that are no finite numbers: load trained ones first")
            if parametrize.is_parametrized(layer, "weight") and _masked(layer) is None:
                raise LinsightError(f"{name} has a parametrization of its own: remove it before pruning")
    return {kind: found[kind] for kind in KINDS if kind in modules}


def _kept(layers: Mapping[str, Any], ratio: float) -> list[Tensor]:
    """The weights that stay, of each of the layers, which are ranked together."""
    each = [importance(layer.weight).flatten() for layer in layers.values()]
    ranked = torch.cat(each)
    count = round(ratio * ranked.numel())
    if not count:
        return [torch.ones_like(some, dtype=torch.bool) for some in each]
    bound = ranked.kthvalue(count).values
    tied = ranked == bound
    gone = (ranked < bound) | (tied & (tied.cumsum(0) <= count - (ranked < bound).sum()))
    return list((~gone).split([some.numel() for some in each]))


def _mask(layer: Any, kept: Tensor) -> int:
    """Mask a layer's weight, beside what is masked in it; how many weights are 0 then."""
    mask, kept = _masked(layer), kept.view_as(layer.weight)
    if mask is not None:
        mask.kept &= kept
    elif not bool(kept.all()):
        parametrize.register_parametrization(layer, "weight", Mask(kept))
    return int((layer.weight == 0).sum())


def _masked(layer: nn.Module) -> Mask | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations["weight"][0]  # type: ignore[index]
    return first if isinstance(first, Mask) else None


class _Uses(TorchFunctionMode):
    """Counts how many times each of these weights is multiplied, whoever does it."""

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        super().__init__()
        self.names, self.uses = names, dict.fromkeys(names.values(), 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if isinstance(weight, nn.Parameter) and weight in self.names:
                self.uses[self.names[weight]] += out.numel() // weight.shape[0]
        return out


def _count(model: nn.Module, input_size: tuple[int, int, int] | None) -> tuple[int | None, dict[str, int]]:
    """The multiply-adds for one image, and how many times each layer multiplies its weights; counted without memory."""
    size = input_size or _told_size(model)
    if size is None:
        return None, {}
    twin = copy.deepcopy(model).to("meta").eval()
    make_permanent(twin)
    names = {m.weight: name for name, m in twin.named_modules() if kind_of(name, m) and _parameter(m)}
    images = torch.empty(1, *size, device="meta", dtype=next(twin.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Uses(names) as seen:
        twin(images)
    return int(counter.get_total_flops()) // 2, {name: uses for name, uses in seen.uses.items() if uses}


def _told_size(model: nn.Module) -> tuple[int, ...] | None:
    """Channels, height and width of the images that a model of timm's kind was made for."""
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if size is None:
        return None
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), size[0])
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)  # it may be another than timm's
    return (channels, *(built or size[1:]))


def _parameter(module: Any) -> bool:
    return isinstance(module.weight, nn.Parameter)
