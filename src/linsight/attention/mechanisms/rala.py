"""Rank-augmented linear attention: keys weighted by a global query, rotated, in a layer with a gate.

Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025 (arXiv 2411.07635), by its published code.
Per head, with f = elu + 1, g the mean of f(q) over the tokens, and rot the rotation below,

    a_j = softmax_j(d^(-1/2) g . f(k_j))
    o_i = rot(f(q_i)) sum_j a_j rot(f(k_j)) v_j^T / (f(q_i) . sum_j a_j f(k_j) + 1e-6)
    out = proj((o + conv5x5(v)) * x_o)

where x_o is a fourth projection of the input, without an activation. The published code weights keys by N a_j and
divides both sums by N; here N cancels first, so no product N a_j k_j is ever rounded. The late stages of the published
models have `rala_softmax` in its place: o_i = sum_j softmax_j(d^(-1/2) rot(q_i) . rot(k_j)) v_j, in the same layer.

Each head is rotated alone: the first half of its channels by the row of the token, the second half by its column. The
angles of one step, one for each channel of a half, are a buffer that checkpoints hold (`angle`): 10000^(-t), t from 0
to 1 in d / 4 steps, each for a pair of channels. Channels (2i, 2i + 1) turn as a pair,

    (x cos(r angle_2i) - y sin(r angle_2i), y cos(r angle_(2i+1)) + x sin(r angle_(2i+1))).

Prefix tokens, of which the publication has none, have no place on the grid: they are not rotated and get no
convolution. A padded batch and dropped tokens leave zeros for the convolution.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from linsight.errors import LinsightError
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

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..parts.token_conv import TokenConv, add_behind, convolved_values
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens, split_heads

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


class GatedRotary(Core):
    """The layer that both forms share: rotation, convolution of v, gate."""

    angle: Tensor
    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    halo = 2
    projections = "qkvx"
    published = (
        Rename("qkvo.", "qkv.", ones=2),
        Rename("proj.", "proj.", ones=2),
        Rename("lepe.", "core.lepe."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = dim // num_heads
        if width % 4:
            raise LinsightError(f"RALA rotates each head on the grid: its width must be divisible by 4, not {width}")
        self.num_heads = num_heads
        self.extra_dim = dim
        angle = 1e4 ** -torch.linspace(0, 1, width // 4, device=device)
        self.register_buffer("angle", angle.repeat_interleave(2).to(dtype or torch.get_default_dtype()))
        self.lepe = TokenConv(dim, 5, device=device, dtype=dtype)

    def rotated(self, x: Tensor, tile: Tile) -> Tensor:
        """`x` `(B, n, H, D)`, in the accumulator's dtype, of all that `tile` sees, turned by its places."""
        (top, bottom), (left, right) = tile.rows, tile.columns
        rows, columns = (
            (torch.arange(last - first, device=x.device, dtype=x.dtype) + first)[:, None] * self.angle.to(x.dtype)
            for first, last in ((top, bottom), (left, right))
        )
        angles = torch.cat(
            [rows[:, None].expand(-1, right - left, -1), columns.expand(bottom - top, -1, -1)], dim=-1
        ).flatten(0, 1)[:, None]
        spatial = x[:, tile.prefix :]
        a, b = unflatten(spatial, -1, (-1, 2)).unbind(-1)
        turned = spatial * angles.cos() + torch.stack([-b, a], dim=-1).flatten(-2) * angles.sin()
        return torch.cat([x[:, : tile.prefix], turned], dim=1) if tile.prefix else turned

    def gated(self, out: Tensor, tokens: Tokens, tile: Tile) -> Tensor:
        """(out + conv(v)) * x_o, of `out` `(B, n, H, E)`, the tile's own tokens."""
        if tokens.extra is None:
            raise LinsightError("the gate of RALA is a fourth projection: it needs projections='qkvx'")
        out = add_behind(out, convolved_values(self.lepe, tokens, tile), tile.prefix)
        return (out * split_heads(tile.inner(tokens.extra), self.num_heads)).to(tokens.q.dtype)


@register(
    "rala",
    formula="o_i = x_o * (rot(f(q_i)) sum_j a_j rot(f(k_j)) v_j^T / (f(q_i) . sum_j a_j f(k_j) + eps) + conv5x5(v)_i), "
    "a = softmax_j(d^(-1/2) mean(f(q)) . f(k_j)), f = elu + 1",
    latex=r"\begin{aligned} o_i &= \frac{\mathrm{rot}(f(q_i)) \sum_j a_j \mathrm{rot}(f(k_j)) v_j^\top}{f(q_i) \cdot "
    r"\sum_j a_j f(k_j) + 10^{-6}}, \quad a_j = \mathrm{softmax}_j(d^{-1/2} g \cdot f(k_j)) \cr "
    r"\mathrm{out} &= \mathrm{proj}((o + \mathrm{conv}_{5 \times 5}(v)) \odot x_o), \quad f = \mathrm{elu} + "
    r"1, \quad g = \mathrm{mean}(f(q)) \end{aligned}",
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
