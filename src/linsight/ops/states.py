"""States: summaries of tokens whose size does not depend on N, and the three ways they merge.

A state is a tensor (merged by addition), a named tuple of states, or anything with a `merge` of its own.
Axes: B batch, N tokens, H heads, D query/key width, E value width. Everything that sums over N is
accumulated in `promote_types(dtype, float32)`, whatever the autocast dtype.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .sizes import spread, traced

State: TypeAlias = Any  # a tensor, a named tuple of states, or what has a `merge`

_STRETCH = 2**14  # tokens that one product sums over


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens are made: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype of its sums."""
    dtype = accumulator(x.dtype)
    return x if x.dtype == dtype else x.to(dtype)


_AS_IT_IS: AbstractContextManager[None] = nullcontext()


@contextmanager
def _autocast_off(device_type: str) -> Iterator[None]:
    with torch.autocast(device_type, enabled=False):
        yield


def autocasts(x: Tensor) -> bool:
    """True where autocast is on for the device of `x`; torch knows none of meta."""
    device = "cpu" if x.is_cpu else x.device.type  # the first is quicker to ask for
    return device != "meta" and torch.is_autocast_enabled(device)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast leaves matrix products alone. Free when autocast is off."""
    if autocasts(x):
        return _autocast_off(x.device.type)
    return _AS_IT_IS


def mask_tokens(x: Tensor, keep: Tensor | None, value: float = 0.0) -> Tensor:
    """`x` `(B, N, ...)` with `value` where `keep` `(B, N)` is False, NaN and Inf included."""
    if keep is None:
        return x
    return x.masked_fill(~keep.reshape(*keep.shape, *[1] * (x.ndim - 2)), value)


def take_tokens(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of `x` `(B, N, ...)` at `places` `(B or 1, M)`: `(B, M, ...)`.

    They are copied whole, where `gather` reads number by number.
    """
    if places.shape[0] == 1:
        return x.index_select(1, places[0])
    rows = places + torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    found = x.flatten(0, 1).index_select(0, rows.flatten())
    return found.reshape(x.shape[0], places.shape[1], *x.shape[2:])


def count_tokens(x: Tensor, keep: Tensor | None) -> Tensor:
    """How many tokens of `x` `(B, N, ...)` are absorbed: `(B,)`, in the accumulator's dtype."""
    dtype = accumulator(x.dtype)
    if keep is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=dtype, device=x.device)
    return keep.sum(dim=1, dtype=dtype)


def outer_sum(k: Tensor, v: Tensor) -> Tensor:
    """sum_n k_n v_n^T: `(B, N, H, D)`, `(B, N, H, E)` -> `(B, H, D, E)`.

    Run eagerly, in stretches of tokens: a product adds up in one row of numbers on some processors, which loses digits
    as a million of them go by.
    """
    if traced() or k.shape[1] <= _STRETCH:
        return k.permute(0, 2, 3, 1) @ v.transpose(1, 2)
    pairs = zip(k.split(_STRETCH, dim=1), v.split(_STRETCH, dim=1), strict=True)
    return torch.stack([outer_sum(*pair) for pair in pairs]).sum(dim=0)


def apply_state(q: Tensor, state: Tensor) -> Tensor:
    """q_n S: `(B, N, H, D)`, `(B or 1, H, D, E)` -> `(B, N, H, E)`, laid out head by head."""
    return (q.transpose(1, 2) @ spread(state, q.shape[0])).transpose(1, 2)


class LogSumExp(NamedTuple):
    """Sums weighted by exp(score), kept relative to the running maximum.

    top: `(B, H, D)` the maximum, a constant for autograd.  total: `(B, H, D)` sum exp(score - top).
    value: `(B, H, D, E)` sum exp(score - top) v^T.
    """

    top: Tensor
    total: Tensor
    value: Tensor

    @classmethod
    def absorb(cls, scores: Tensor, v: Tensor, keep: Tensor | None = None) -> "LogSumExp":
        """The state of `scores` `(B, N, H, D)`, one for each token and slot, and of `v` `(B, N, H, E)`."""
        dtype = accumulator(v.dtype)
        with full_precision(v):
            scores = mask_tokens(scores.to(dtype), keep, float("-inf"))
            # The maximum cancels in value / total, so no gradient passes through it. The clamp keeps
            # a tile without a single kept token at total 0 instead of NaN.
            top = scores.detach().amax(dim=1).clamp(min=torch.finfo(dtype).min)
            weights = torch.exp(scores - top[:, None])
            return cls(top, weights.sum(dim=1), outer_sum(weights, mask_tokens(v, keep).to(dtype)))

    def merge(self, other: "LogSumExp") -> "LogSumExp":
        """The sums of both, brought to the larger maximum."""
        top = torch.maximum(self.top, other.top)
        a, b = torch.exp(self.top - top), torch.exp(other.top - top)
        return LogSumExp(
            top,
            self.total * a + other.total * b,
            self.value * a[..., None] + other.value * b[..., None],
        )

    def mean(self) -> Tensor:
        """The average of v under weights softmax(score), `(B, H, D, E)`; 0 where no token was absorbed."""
        return self.value / self.denominator[..., None]

    @property
    def denominator(self) -> Tensor:
        """The total, 1 where no token was absorbed.

        The maximum itself counts 1, and a single token's total is that: no clamp, which has no gradient there.
        """
        return torch.where(self.total > 0, self.total, 1)


class Moments(NamedTuple):
    """Count, means and central cross-product of keys and values.

    Central, because the raw form sum k v^T - n mean(k) mean(v)^T cancels: with tokens offset by 100
    and a million of them it loses six digits. Merged pairwise (Chan, Golub, LeVeque 1979).

    count: `(B,)`.  k: `(B, H, D)`.  v: `(B, H, E)`.  cross: `(B, H, D, E)` sum (k - mean)(v - mean)^T.
    """

    count: Tensor  # type: ignore[assignment]  # also a method of tuples
    k: Tensor
    v: Tensor
    cross: Tensor

    @classmethod
    def absorb(cls, k: Tensor, v: Tensor, keep: Tensor | None = None) -> "Moments":
        """The moments of `k` `(B, N, H, D)` and `v` `(B, N, H, E)`."""
        with full_precision(k):
            count = count_tokens(k, keep)
            k, v = widened(mask_tokens(k, keep)), widened(mask_tokens(v, keep))
            mean_k, mean_v = _mean(k, keep, count), _mean(v, keep, count)
            # A token that is not kept must stay zero after centring.
            centred_k = mask_tokens(k - mean_k[:, None], keep)
            return cls(count, mean_k, mean_v, outer_sum(centred_k, v - mean_v[:, None]))

    @classmethod
    def stacked(cls, parts: "Sequence[Moments]") -> "Moments":
        """The moments of all tokens of `parts`, in fewer steps than merging them one by one."""
        counts, ks, vs, crosses = (torch.stack(fields) for fields in zip(*parts, strict=True))
        count = counts.sum(dim=0)
        share = (counts / count.clamp_min(1))[..., None, None]
        k, v = (share * ks).sum(dim=0), (share * vs).sum(dim=0)
        between = (counts[..., None, None] * (ks - k))[..., None] * (vs - v)[..., None, :]
        return cls(count, k, v, (crosses + between).sum(dim=0))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of tokens."""
        count = self.count + other.count
        share = (other.count / count.clamp_min(1))[:, None, None]
        k, v = other.k - self.k, other.v - self.v
        cross = self.cross + other.cross
        cross = cross + (self.count[:, None, None, None] * share[..., None]) * k[..., None] * v[..., None, :]
        return Moments(count, self.k + k * share, self.v + v * share, cross)

    def covariance(self, scale: float = 1.0) -> Tensor:
        """The covariance times `scale`: scale cross / count, `(B, H, D, E)`."""
        return self.cross * (scale / self.count.clamp_min(1))[:, None, None, None]


def _mean(x: Tensor, keep: Tensor | None, count: Tensor) -> Tensor:
    """The mean over the kept tokens of `x` `(B, N, H, D)`, which is zero elsewhere; 0 where there are none."""
    return x.mean(dim=1) if keep is None else x.sum(dim=1) / count.clamp_min(1)[:, None, None]


def merge(a: State, b: State) -> State:
    """The state of the tokens of `a` and of `b` together: associative, and alike for any mechanism.

    A state merges by its own `merge`, a tuple field by field, tensors by their sum.
    """
    own = getattr(a, "merge", None)
    if own is not None:
        return own(b)
    fields = getattr(a, "_fields", None)
    return a + b if fields is None else type(a)(*map(merge, a, b))
