"""PolaFormer++: linear attention by polarity with exponential features, in the gated, rotated layer of `rala`.

The second form of Meng et al., "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", ICLR 2025 (arXiv
2501.15061), by its published code. With x+ = relu(x) and x- = relu(-x), learnable temperatures s_1, s_2 (heads, 2d)
that a sigmoid brings between 0 and 1, rot the rotation of `rala` over all 2d features of a head, and means over the N
keys,

    Q_same = exp([q+ | q-] s_1) - 1,   Q_opp = exp([q- | q+] s_2) - 1,   K = exp([k+ | k-]) - 1,   v = [v_1 | v_2]
    o_same = rot(Q_same) mean(rot(K) v_1^T) / (Q_same . mean(K) + 1e-6),   o_opp alike of Q_opp and v_2
    out = proj(([o_same | o_opp] + conv5x5(v)) * x_o)

where x_o is a fourth projection of the input. There is no scale and no power. Features are made relative to the largest
exponent of a query and of all keys of a head, and so is the constant below the line: this cancels, and no feature
overflows. Results may: rotated, the largest feature of a query meets those of keys that the normaliser, which is not
rotated, does not see, so outputs are exponential in activations. Everything is computed in float32 (float64 for
float64).
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linsight.ops import Tile, accumulator, apply_state, count_tokens, full_precision, mask_tokens, outer_sum

from ..capabilities import Structure
from ..core import Rename
from ..parts.gated_rotary import GatedRotary
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_EPS = 1e-6


class ExpSums(NamedTuple):
    """Sums over keys, relative to exp(top); once finished, means.

    top: `(B, H)`, a constant for autograd.  kv: `(B, H, 2D, E)`.  k: `(B, H, 2D)`.  count: `(B,)` tokens.
    """

    top: Tensor
    kv: Tensor
    k: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples

    def merge(self, other: "ExpSums") -> "ExpSums":
        """The sums of both, brought to the larger exponent."""
        top = torch.maximum(self.top, other.top)
        a, b = (torch.exp(own - top)[..., None] for own in (self.top, other.top))
        kv = self.kv * a[..., None] + other.kv * b[..., None]
        return ExpSums(top, kv, self.k * a + other.k * b, self.count + other.count)


class ExpMeans(Round):
    """The means of rot(K) v^T and of K."""

    def absorb(self, core: "PolaFormerPP", tokens: Tokens, tile: Tile, done: Done) -> ExpSums:
        """The sums over the tile's tokens; features of dropped tokens are exp(0) - 1 = 0."""
        k, v = (mask_tokens(x, tokens.keep).to(accumulator(x.dtype)) for x in tokens[1:3])
        with full_precision(k):
            k = by_sign(k)
            top = k.detach().amax(dim=(1, 3))
            k = grown(k, top[:, None, :, None])
            return ExpSums(top, outer_sum(core.rotated(k, tile), v), k.sum(dim=1), count_tokens(k, tokens.keep))

    def finish(self, core: "PolaFormerPP", state: ExpSums, done: Done) -> ExpSums:
        """Divided by the number of tokens."""
        share = 1 / state.count.clamp(min=1)[:, None, None]
        return state._replace(kv=state.kv * share[..., None], k=state.k * share)


@register(
    "polaformerpp",
    formula="o_same = rot(Q) mean(rot(K) v_1^T) / (Q . mean(K) + eps), o_opp alike of Q' and v_2, "
    "Q = exp(s_1 [q+ | q-]) - 1, Q' = exp(s_2 [q- | q+]) - 1, K = exp([k+ | k-]) - 1; "
    "out = ([o_same | o_opp] + conv5x5(v)) * x_o",
    latex=r"\begin{aligned} o^s_i &= \frac{\mathrm{rot}(Q^s_i) \mathrm{mean}_j(\mathrm{rot}(K_j) v_{1j}^\top)}{Q^s_i "
    r"\cdot \mathrm{mean}_j(K_j) + 10^{-6}}, \quad o^o_i \text{ alike of } Q^o_i, v_2, \quad v = [v_1, v_2] \cr "
    r"Q^s &= e^{[q^+, q^-] \odot s_1} - 1, \quad Q^o = e^{[q^-, q^+] \odot s_2} - 1, \quad K = e^{[k^+, k^-]} - 1 \cr "
    r"\mathrm{out} &= \mathrm{proj}(([o^s, o^o] + \mathrm{conv}_{5 \times 5}(v)) \odot x_o) \end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("PolaFormer: Polarity-aware Linear Attention for Vision Transformers", "2501.15061", "ICLR 2025"),
)
class PolaFormerPP(GatedRotary):
    """Rotary linear attention by polarity with exponential features, with a convolution of v and a gate."""

    structure = Structure(stream=True)
    rounds = (ExpMeans(),)
    turned = 2
    largest = 1e1
    published = (
        Rename("qkvg.", "qkv."),
        Rename("lepe.", "core.lepe."),
        Rename("s1", "core.s1"),
        Rename("s2", "core.s2"),
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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (1, num_heads, 1, 2 * (dim // num_heads))
        self.s1, self.s2 = (nn.Parameter(torch.zeros(*shape, **factory)) for _ in range(2))

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Both streams against the one state, the convolution of v, and the gate."""
        state: ExpSums = done[0]
        q = tile.inner(tokens.q)
        q = q.to(accumulator(q.dtype))
        width = q.shape[-1]
        own = dataclasses.replace(tile, halo=0)
        outs = []
        with full_precision(q):
            halves = state.kv.split(width // 2, dim=-1)
            for signed, temperature, kv in zip((q, -q), (self.s1, self.s2), halves, strict=True):
                x = by_sign(signed) * temperature.to(q.dtype).transpose(1, 2).sigmoid()
                top = x.detach().amax(dim=-1, keepdim=True)
                features = grown(x, top)
                eps = _EPS * torch.exp(-top - state.top[:, None, :, None])
                below = apply_state(features, state.k[..., None]) + eps
                above = apply_state(self.rotated(features, own), kv)
                outs.append(above / below.clamp(min=torch.finfo(q.dtype).tiny))
        return self.gated(torch.cat(outs, dim=-1), tokens, tile)


def by_sign(x: Tensor) -> Tensor:
    """[x+ | x-]."""
    return torch.cat([x, -x], dim=-1).relu()


def grown(x: Tensor, top: Tensor) -> Tensor:
    """(exp(x) - 1) / exp(top) of `x` from 0 to `top`, with all digits where x is small."""
    return torch.exp(x - top) * -torch.expm1(-x)
