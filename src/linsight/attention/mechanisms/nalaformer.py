"""NaLaFormer: linear attention of directions by sign, sharpened by a power that follows the norm of each query.

Meng et al., "Norm x Direction: Restoring the Missing Query Norm in Vision Linear Attention", ICML 2026 (arXiv
2506.21137), by its published code. Per head, with x+ = relu(x) and x- = relu(-x), means over the N tokens, and rot the
rotation of `rala`, of each part alone,

    Q_i = [(q_i+ / r_i)^p_i | (q_i- / r_i)^p_i],   r_i = |q_i|,   p_i = 3 (1/2 + tanh r_i)
    K_j = [(k_j^3)+ | (k_j^3)-]
    o_i = rot(Q_i) mean_j(rot(K_j) v_j^T) / (Q_i . mean_j(K_j) + 1e-6)
    out = proj(LN(o + conv5x5(v)) * SiLU(g))

where LN is over all channels and g a fourth projection of the input. The layer is that of `rala` but for the norm and
the SiLU. A query of norm 0, which is 0 / 0 in the published code, has Q = 0 here. All up to the gate is computed in
float32 (float64 for float64), as published: k^3 has no room in half precision.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.ops import (
    LinearState,
    Tile,
    accumulator,
    apply_state,
    count_tokens,
    full_precision,
    mask_tokens,
    outer_sum,
)

from ..capabilities import Structure
from ..core import OPEN_SILU, Rename
from ..parts.gated_rotary import GatedRotary
from ..parts.kernel import CountedSums, KernelMeans
from ..parts.wide import WideLayerNorm
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens, merge_heads, split_heads

_EPS = 1e-6
_SHORTEST = 1e-12  # of a query, so that a query of norm 0 is divided


class DirectionMeans(KernelMeans):
    """The means of rot(K) v^T and of K."""

    def absorb(self, core: "NaLaFormer", tokens: Tokens, tile: Tile, done: Done) -> CountedSums:  # type: ignore[override]
        """The sums over the tile's tokens, and their number."""
        k, v = (mask_tokens(x, tokens.keep).to(accumulator(x.dtype)) for x in tokens[1:3])
        with full_precision(k):
            k = by_sign(k**3)
            sums = LinearState(outer_sum(core.rotated_parts(k, tile), v), k.sum(dim=1))
        return CountedSums(sums, count_tokens(tokens.v, tokens.keep))


@register(
    "nalaformer",
    formula="o_i = rot(Q_i) mean(rot(K) v^T) / (Q_i . mean(K) + eps), Q = [q+ | q-]^p / r^p, p = 3 (1/2 + tanh r), "
    "r = |q|, K = [k+ | k-]^3; out = LN(o + conv5x5(v)) * SiLU(g)",
    latex=r"\begin{aligned} o_i &= \frac{\mathrm{rot}(Q_i) \mathrm{mean}_j(\mathrm{rot}(K_j) v_j^\top)}{Q_i \cdot "
    r"\mathrm{mean}_j(K_j) + 10^{-6}}, \quad Q_i = \left( \frac{[q_i^+, q_i^-]}{r_i} \right)^{3 (1/2 + \tanh r_i)}, "
    r"\quad r_i = \lVert q_i \rVert, \quad K_j = [k_j^+, k_j^-]^3 \cr "
    r"\mathrm{out} &= \mathrm{proj}(\mathrm{LN}(o + \mathrm{conv}_{5 \times 5}(v)) \odot \mathrm{SiLU}(g)) "
    r"\end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper(
        "Norm x Direction: Restoring the Missing Query Norm in Vision Linear Attention", "2506.21137", "ICML 2026"
    ),
)
class NaLaFormer(GatedRotary):
    """Rotary linear attention of directions by sign, normed and gated behind a convolution of v."""

    structure = Structure(stream=True)
    rounds = (DirectionMeans(),)
    open_gate = OPEN_SILU
    published = (
        Rename("qkvg.", "qkv."),
        Rename("out_proj.", "proj."),
        Rename("lepe.", "core.lepe."),
        Rename("ln.", "core.ln."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype)
        self.ln = WideLayerNorm(dim, device=device, dtype=dtype)

    def rotated_parts(self, x: Tensor, tile: Tile) -> Tensor:
        """`x` `(B, n, H, 2D)` with both its halves turned by the places of `tile`."""
        width = x.shape[-1] // 2
        return torch.cat([self.rotated(part, tile) for part in x.split(width, dim=-1)], dim=-1)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Q against both means, the convolution of v, the norm and the gate."""
        state: LinearState = done[-1]
        q = tile.inner(tokens.q)
        q = q.to(accumulator(q.dtype))
        with full_precision(q):
            q = directions(q)
            below = apply_state(q, state.k[..., None]) + _EPS
            out = apply_state(self.rotated_parts(q, dataclasses.replace(tile, halo=0)), state.kv) / below
        return self.gated(out, tokens, tile)

    def join(self, out: Tensor, gate: Tensor) -> Tensor:
        """LN(out) * SiLU(gate), heads merged for the norm."""
        return split_heads(self.ln(merge_heads(out)), self.num_heads) * F.silu(gate.to(out.dtype))


def by_sign(x: Tensor) -> Tensor:
    """[x+ | x-]."""
    return torch.cat([x, -x], dim=-1).relu()


def directions(q: Tensor) -> Tensor:
    """Q `(B, n, H, 2D)` of queries `(B, n, H, D)`."""
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    return by_sign(q / norm.clamp(min=_SHORTEST)) ** (3 * (0.5 + norm.tanh()))
