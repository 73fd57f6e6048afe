"""Stage 0 of a conversion: the softmax attention of a trained model, measured layer by layer. Nothing is trained.

The model runs with its own softmax, in cores whose queries and keys are looked at. With P the weights of a query over
the keys that it sees, averaged over queries, heads and images:

    scores      5 % and 95 % of s q.k, and the share below -1, where 1 + z + z^2 / 2 rises again as softmax falls
    key shift   |mean k| / mean |k|; about 0.5 in trained models, 0.07 in random ones (T5, arXiv 2605.02772)
    entropy     -sum P ln P, and the same over ln N: 1 is uniform, 0 is one key
    peak        max P
    locality    sum of P over the keys at most k = 1, 2, 3 rows and columns away; of a sequence, places

Scores "centred" are those of keys without their mean: softmax is the same. The output error of each layer alone, with a
mechanism in its place and all before it as they were, is that of `layer_errors`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import Core, Tokens
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout, accumulator

from ._place import GridLike
from .conversion import Layers, attentions, choose, linearize
from .mixing import mixings
from .transfer import Batch, Call, call, evaluated, layer_errors

REACH = (1, 2, 3)  # rows and columns of locality
_AT_ONCE = 2**22  # scores that are computed at once
_DRAWN = 2**12  # scores of a batch that quantiles are made of
_FEW = 0.01  # a share of scores that does not matter
_SHIFT, _SPIKY, _FLAT, _LOCAL = 0.2, 0.8, 0.95, 0.5  # bounds of `advice`


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """One attention of a trained model: see the module.

    tokens: keys that a query sees, on average.  below, below_centred: share of s q.k below -1.  relative: entropy over
    ln N.  locality: for each of `REACH`, None for keys of another grid.  error: None where no mechanism was tried.
    """

    name: str
    heads: int
    tokens: float
    low: float
    high: float
    below: float
    below_centred: float
    key_shift: float
    entropy: float
    relative: float
    peak: float
    locality: tuple[float, ...] | None
    error: float | None = None


def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    attention: str | None = None,
    layers: Layers = None,
    grid: GridLike | None = None,
    prefix: int = 0,
    queries: int = 256,
    call: Call = call,
    **options: Any,
) -> list[LayerProfile]:
    """Measure the attentions of a trained model that `linearize` can take over, in the order of the model.

    Args:
        batches: see `transfer.call`. They are gone through once.
        attention: a mechanism to try in each layer alone, for `error`, with its `options`, which may be all that
            `linearize` takes.
        layers, grid, prefix: as of `linearize`.
        queries: of a batch that are looked at, drawn at random but always the same; all that have a place, if fewer.

    Raises:
        LinsightError: there is no attention that could be measured, or no batch, or none of the attentions ran.
    """
    where: dict[str, Any] = {"grid": grid, "prefix": prefix}
    chosen = choose(list(attentions(model)), layers)
    twin = _softmax(model, chosen, where)
    student = None if attention is None else linearize(model, attention, layers=layers, **where, **options)
    found = {name: mixing for name, mixing in mixings(twin).items() if name in chosen}
    probes = {name: _Probe(queries) for name in found}
    handles = [mixing.core.register_forward_pre_hook(probes[name], with_kwargs=True) for name, mixing in found.items()]
    errors: dict[str, list[float]] = {}
    count = 0
    with evaluated(twin), torch.no_grad():
        for batch in batches:
            call(twin, batch)
            count += 1
            if student is not None:
                for name, error in layer_errors(model, student, [batch], call=call).items():
                    errors.setdefault(name, []).append(error)
    for handle in handles:
        handle.remove()
    ran = {name: probe for name, probe in probes.items() if probe.rows}
    if not ran:
        raise LinsightError("there are no batches" if not count else f"none of {', '.join(chosen[:3])} ... ran")
    return [
        probe.result(name, found[name].num_heads, sum(errors[name]) / len(errors[name]) if name in errors else None)
        for name, probe in ran.items()
    ]


def _softmax(model: nn.Module, chosen: list[str], where: dict[str, Any]) -> nn.Module:
    """A copy of the model that computes the same, with cores of softmax in the layers chosen."""
    found = attentions(model)
    causal = {name for name in chosen if found[name][1].causal(model, name)}
    twin, whole = model, False
    for names, options in ((set(chosen) - causal, {}), (causal, {"causal": True})):
        if names:
            more: dict[str, Any] = {**where, **options}
            twin = linearize(twin, "softmax", layers=names.__contains__, in_place=whole, **more)
            whole = True
    return twin


class _Probe:
    """A forward pre-hook of a core of softmax: sums over what it is given."""

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.random = torch.Generator().manual_seed(0)
        self.rows = self.pairs = self.placed = self.keys = 0
        self.sums: dict[str, float] = {}
        self.drawn: list[Tensor] = []

    def __call__(self, core: Core, args: tuple[Tokens, Layout], beside: Mapping[str, Any]) -> None:
        """Measure one batch."""
        tokens, layout = args
        q, k, grid, keep = tokens.q, tokens.k, layout.grid, tokens.keep
        bias, own = beside.get("score_bias"), beside.get("context_layout") is None
        dtype = accumulator(q.dtype)
        q, k = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype)
        if keep is None and bias is not None:  # keys that no query sees are padding
            keep = (~_dropped(bias).flatten(1, 2).all(1)).expand(len(k), -1)
        self._shift(k, keep)
        places = torch.ones(q.shape[:2], dtype=torch.bool) if keep is None or not own else keep.cpu()
        rows = places.nonzero()
        rows = rows[torch.randperm(len(rows), generator=self.random)[: self.queries]]
        for image in rows[:, 0].unique().tolist():
            mine = rows[rows[:, 0] == image, 1].to(q.device)
            for some in mine.split(max(1, _AT_ONCE // (k.shape[1] * k.shape[2]))):
                seen = torch.ones(len(some), k.shape[1], dtype=torch.bool, device=q.device)
                if keep is not None:
                    seen &= keep[image]
                if core.causal:
                    seen &= torch.arange(k.shape[1], device=q.device) <= some[:, None]
                scores = torch.einsum("rhd,nhd->hrn", q[image, some], k[image])
                whole = scores
                if bias is not None:
                    added = bias[image if len(bias) > 1 else 0]  # (H or 1, M or 1, N)
                    added = added if added.shape[1] == 1 else added[:, some]
                    seen = seen & ~_dropped(added)
                    whole = scores if added.dtype == torch.bool else scores + added.to(dtype)
                weights = self._absorb(scores, whole, seen.expand_as(scores), len(some) / len(rows))
                if own:
                    self._locate(weights, some, grid)

    def _shift(self, k: Tensor, keep: Tensor | None) -> None:
        """The shift of the keys `(B, N, H, D)`."""
        kept = torch.ones_like(k[..., :1]) if keep is None else keep[:, :, None, None].to(k.dtype)
        count = kept.sum(1).clamp(min=1)  # (B, 1, 1)
        k = k.where(kept > 0, 0)
        mean, length = (k.sum(1) / count).norm(dim=-1), (k.norm(dim=-1).sum(1) / count[..., 0])  # (B, H)
        shift = mean / length.clamp(min=torch.finfo(k.dtype).tiny)
        self._add("key_shift", shift)
        self.keys += shift.numel()

    def _absorb(self, scores: Tensor, whole: Tensor, seen: Tensor, share: float) -> Tensor:
        """Add rows `(H, r, N)`, which are this share of those of the batch; their weights.

        scores: s q.k.  whole: with what is added to that.  seen: False for keys that a query does not see.
        """
        some = seen.any(-1)
        weights = whole.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0)
        count = seen.sum(-1)
        entropy = -torch.xlogy(weights, weights).sum(-1)[some]
        self._add("entropy", entropy)
        self._add("relative", entropy / count[some].clamp(min=2).log())
        self._add("peak", weights.amax(-1)[some])
        self._add("tokens", count[some])
        self.rows += int(some.sum())
        mean = scores.masked_fill(~seen, 0).sum(-1, keepdim=True) / count.clamp(min=1)[..., None]
        self._add("below", (scores < -1) & seen)
        self._add("below_centred", (scores - mean < -1) & seen)
        self.pairs += int(count.sum())
        drawn, most = scores[seen], math.ceil(_DRAWN * share)
        if len(drawn) > most:
            drawn = drawn[torch.randint(len(drawn), (most,), generator=self.random).to(drawn.device)]
        self.drawn.append(drawn.cpu())
        return weights

    def _locate(self, weights: Tensor, rows: Tensor, grid: Grid) -> None:
        """Add the locality of weights `(H, r, N)` of these rows."""
        on = rows >= grid.prefix
        rows, keys = rows[on] - grid.prefix, torch.arange(grid.height * grid.width, device=rows.device)
        down = (rows // grid.width)[:, None] - keys // grid.width
        across = (rows % grid.width)[:, None] - keys % grid.width
        away = torch.maximum(down.abs(), across.abs())  # (r, N)
        weights = weights[:, on, grid.prefix :]
        for reach in REACH:
            self._add(f"within {reach}", weights.masked_fill(away > reach, 0).sum(-1))
        self.placed += weights.shape[0] * weights.shape[1]

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())

    def result(self, name: str, heads: int, error: float | None) -> LayerProfile:
        """The means of all that was measured."""
        low, high = torch.cat(self.drawn).double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        row = {key: self.sums[key] / self.rows for key in ("tokens", "entropy", "relative", "peak")}
        row |= {key: self.sums[key] / self.pairs for key in ("below", "below_centred")}
        local = tuple(self.sums[f"within {reach}"] / self.placed for reach in REACH) if self.placed else None
        shift = self.sums["key_shift"] / self.keys
        return LayerProfile(name, heads, low=low, high=high, key_shift=shift, locality=local, error=error, **row)


def _dropped(bias: Tensor) -> Tensor:
    """True where a bias on the scores, or a mask in its place, hides a key."""
    return ~bias if bias.dtype == torch.bool else bias < torch.finfo(bias.dtype).min / 2


def worst(layers: Sequence[LayerProfile], *, keep: int) -> list[str]:
    """The names of the `keep` layers that are hardest to replace, in the order of the model, to stay softmax.

    Those of the largest error; where no mechanism was tried, of the lowest entropy over ln N.

    >>> kept = worst(layers, keep=2)
    >>> student = linsight.linearize(model, layers=lambda name: name not in kept)

    Raises:
        LinsightError: there are not so many.
    """
    if not 0 <= keep <= len(layers):
        raise LinsightError(f"keep={keep}: {len(layers)} layers were measured, so 0 to {len(layers)} can be kept")
    hardest = sorted(layers, key=_hardness, reverse=True)[:keep]
    return [layer.name for layer in layers if layer in hardest]


def _hardness(layer: LayerProfile) -> float:
    return 1 - layer.relative if layer.error is None else layer.error


def table(layers: Sequence[LayerProfile]) -> str:
    """A text with a line for each layer."""
    head = ["layer", "tokens", "5 %", "95 %", "< -1", "centred", "shift", "entropy", "/ ln N", "peak"]
    head += [f"within {reach}" for reach in REACH] + ["error"]
    rows = [head]
    for one in layers:
        local = ["-"] * len(REACH) if one.locality is None else [f"{share:.2f}" for share in one.locality]
        shares = [f"{share:.1%}" for share in (one.below, one.below_centred)]
        means = [f"{value:.2f}" for value in (one.key_shift, one.entropy, one.relative, one.peak)]
        row = [one.name, f"{one.tokens:.0f}", f"{one.low:.2f}", f"{one.high:.2f}", *shares, *means, *local]
        rows.append([*row, "-" if one.error is None else f"{one.error:.3f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


def advice(layers: Sequence[LayerProfile]) -> list[str]:
    """Lines on what follows for a conversion: feature maps, the mean of keys, layers to keep, windows."""
    lines = [_of_taylor(layers), _of_keys(layers)]
    spiky = [one for one in layers if one.relative < _SPIKY]
    if spiky:
        least = min(spiky, key=lambda one: one.relative)
        lines.append(
            f"spiky rows in {_names(spiky)}, down to {least.relative:.2f} of ln N: take a map that is learned by "
            f"distillation, as hedgehog's, since fixed ones are nearly uniform"
        )
    flat = [one for one in layers if one.relative > _FLAT]
    if flat:
        lines.append(f"nearly uniform rows in {_names(flat)}: any mechanism serves there")
    local = [one for one in layers if _window(one)]
    if local:
        side = max(_window(one) for one in local)
        lines.append(
            f"local rows in {_names(local)}: half of the weight is within {side // 2} places, so a window beside the "
            f"mechanism holds it, hybrid=Hybrid(window={side})"
        )
    if len(layers) > 2:
        names = worst(layers, keep=max(1, len(layers) // 4))
        why = "by entropy; attention= tries a mechanism" if layers[0].error is None else "by output error"
        lines.append(f"hardest to replace, {why}: {', '.join(names)}; keep softmax there first")
    return lines


def _of_taylor(layers: Sequence[LayerProfile]) -> str:
    most = max(layers, key=lambda one: one.below)
    centred = max(one.below_centred for one in layers)
    if most.below <= _FEW:
        return "Taylor maps are valid: hardly any s q.k lies below -1"
    told = f"s q.k lies below -1 for up to {most.below:.0%} of pairs ({most.name})"
    if centred <= _FEW:
        return f"Taylor maps are valid with centred=True; without, {told}"
    return f"Taylor maps are not valid: {told}, and {centred:.0%} of those of centred keys"


def _of_keys(layers: Sequence[LayerProfile]) -> str:
    off = [one for one in layers if one.key_shift > _SHIFT]
    if not off:
        return "keys lie around 0: centred=True is not needed"
    most = max(off, key=lambda one: one.key_shift)
    return (
        f"keys lie off-centre in {len(off)} of {len(layers)} layers, by {most.key_shift:.2f} of their length in "
        f"{most.name}: pass centred=True for mechanisms that see it"
    )


def _window(layer: LayerProfile) -> int:
    """The side of the least window that has half of the weight, and clearly more than a uniform row's; else 0."""
    for reach, share in zip(REACH, layer.locality or (), strict=False):
        if share >= _LOCAL and share > 2 * (2 * reach + 1) ** 2 / layer.tokens:
            return 2 * reach + 1
    return 0


def _names(layers: Sequence[LayerProfile]) -> str:
    more = f" and {len(layers) - 3} more" if layers[3:] else ""
    return ", ".join(one.name for one in layers[:3]) + more
