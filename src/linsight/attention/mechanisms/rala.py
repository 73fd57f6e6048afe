"""Rank-augmented linear attention: keys weighted by a global query, rotated, in a layer with a gate.

Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025 (arXiv 2411.07635), by its published code.
Per head, with f = elu + 1, g the mean of f(q) over the tokens, and rot the rotation of a token by its place,

    a_j = softmax_j(d^(-1/2) g . f(k_j))
    o_i = rot(f(q_i)) sum_j a_j rot(f(k_j)) v_j^T / (f(q_i) . sum_j a_j f(k_j) + 1e-6)
    out = proj((o + conv5x5(v)) * x_o)

where x_o is a fourth projection of the input, without an activation. The published code weights keys by N a_j and
divides both sums by N; here N cancels first, so no product N a_j k_j is ever rounded. The late stages of the published
models have `rala_softmax` in its place: o_i = sum_j softmax_j(d^(-1/2) rot(q_i) . rot(k_j)) v_j, in the same layer.

The layer and its rotation are those of `GatedRotary`, which others share.

Prefix tokens, of which the publication has none, have no place on the grid: they are not rotated and get no
convolution. A padded batch and dropped tokens leave zeros for the convolution.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from linsight.ops import (
    FEATURE_MAPS,
    LinearState,
    LogSumExp,
    Tile,
    accumulator,
    apply_state,
    count_tokens,
    full_precision,
    mask_tokens,
    outer_sum,
    unflatten,
)

from ..capabilities import Structure
from ..parts.gated_rotary import GatedRotary
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_EPS = 1e-6


class QuerySum(NamedTuple):
    """total: `(B, H, D)` sum f(q).  count: `(B,)` tokens absorbed."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class GlobalQuery(Round):
    """g, the mean of the mapped queries."""

    of: Literal["keys", "queries"] = "queries"

    def absorb(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> QuerySum:
        """The sum of the tile's queries, and their number."""
        return QuerySum(mask_tokens(mapped(tokens.q), tokens.keep).sum(dim=1), count_tokens(tokens.q, tokens.keep))

    def finish(self, core: Any, state: QuerySum, done: Done) -> Tensor:
        """g `(B, H, D)`."""
        return state.total / state.count.clamp(min=1)[:, None, None]


class WeightedSums(Round):
    """Both sums over the keys, weighted by a softmax over the tokens that g scores."""

    def absorb(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """One slot a head, whose value is the matrix of the sums side by side, `(B, H, 1, D * (E + 1))`."""
        k, v = (mask_tokens(x, tokens.keep) for x in (mapped(tokens.k), tokens.v.to(accumulator(tokens.v.dtype))))
        with full_precision(k):
            scores = torch.einsum("bnhd,bhd->bnh", k, done[0] * k.shape[-1] ** -0.5)
            scores = mask_tokens(scores, tokens.keep, float("-inf"))
            top = scores.detach().amax(dim=1).clamp(min=torch.finfo(k.dtype).min)  # cancels, as in `LogSumExp.absorb`
            weights = torch.exp(scores - top[:, None])
            k = k * weights[..., None]
            sums = torch.cat([outer_sum(core.rotated(k, tile), v), k.sum(dim=1)[..., None]], dim=-1)
            return LogSumExp(top[..., None], weights.sum(dim=1)[..., None], sums.flatten(2)[:, :, None])

    def finish(self, core: Any, state: LogSumExp, done: Done) -> LinearState:
        """The weighted means of rot(f(k)) v^T and of f(k)."""
        means = unflatten(state.mean()[:, :, 0], -1, (done[0].shape[-1], -1))
        return LinearState(means[..., :-1], means[..., -1])


@register(
    "rala",
    formula="o_i = x_o * (rot(f(q_i)) sum_j a_j rot(f(k_j)) v_j^T / (f(q_i) . sum_j a_j f(k_j) + eps) + conv5x5(v)_i), "
    "a = softmax_j(d^(-1/2) mean(f(q)) . f(k_j)), f = elu + 1",
    latex=r"\begin{aligned} o_i &= \frac{\mathrm{rot}(f(q_i)) \sum_j a_j \mathrm{rot}(f(k_j)) v_j^\top}{f(q_i) \cdot "
    r"\sum_j a_j f(k_j) + 10^{-6}}, \quad a_j = \mathrm{softmax}_j(d^{-1/2} g \cdot f(k_j)) \cr "
    r"\mathrm{out} &= \mathrm{proj}((o + \mathrm{conv}_{5 \times 5}(v)) \odot x_o), \quad f = \mathrm{elu} + "
    r"1, \quad g = \mathrm{mean}(f(q)) \end{aligned}",
    family="feature map",
    also=("RAVLT",),
    complexity="O(N d^2)",
    paper=Paper("Breaking the Low-Rank Dilemma of Linear Attention", "2411.07635", "CVPR 2025"),
)
class RALA(GatedRotary):
    """Rotary linear attention whose keys are weighted by a global query, with a convolution of v and a gate."""

    structure = Structure(stream=True)
    rounds = (GlobalQuery(), WeightedSums())

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """f(q) against both sums, the convolution of v, and the gate."""
        state: LinearState = done[-1]
        q = mapped(tile.inner(tokens.q))
        with full_precision(q):
            below = apply_state(q, state.k[..., None]) + _EPS
            out = apply_state(self.rotated(q, dataclasses.replace(tile, halo=0)), state.kv) / below
        return self.gated(out, tokens, tile)


def mapped(x: Tensor) -> Tensor:
    """f, in the accumulator's dtype."""
    return FEATURE_MAPS["elu+1"](x.to(accumulator(x.dtype)))
