"""Magnitude-aware linear attention: weights that sum to 1 by a factor and an offset, and so follow the query's norm.

Fan et al., "Rectifying Magnitude Neglect in Linear Attention", ICCV 2025 (arXiv 2507.00698), by its published code.
Per head, with f = elu + 1, s = d^(-1/2), means over the N tokens, and rot the rotation of `rala`,

    z_i = s f(q_i) . mean_j(f(k_j))
    o_i = (1 + 1 / (z_i + 1e-6)) s rot(f(q_i)) mean_j(rot(f(k_j)) v_j^T) - z_i mean_j(v_j)
    out = proj((o + conv5x5(v)) * x_o)

in the layer of `rala`, with its keys. Not rotated, the weights of a query sum to 1 and may be negative; rotated they no
longer do, since z is not, and checkpoints need it so.

Both terms are as large as z and nearly cancel where keys or values are far from 0 and little is turned. So here, with
the covariance C of rot(f(k)) and v, and p_i = s rot(f(q_i)) . mean_j(rot(f(k_j))),

    o_i = (1 + 1 / (z_i + 1e-6)) s rot(f(q_i)) C + (p_i / (z_i + 1e-6) + (p_i - z_i)) mean_j(v_j),

where p - z is made of what the rotation adds to a query and to the mean key: 0 where it adds nothing.

All of it is computed in float32 (float64 for float64), where f is never 0 and 1e-6 counts. The late stages of the
published models have `rala_softmax` in its place.
"""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from linsight.ops import Features, Moments, Tile, apply_state, central_absorb, full_precision, mask_tokens

from ..capabilities import Structure
from ..parts.gated_rotary import GatedRotary
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_EPS = 1e-6


class KeyMoments(NamedTuple):
    """moments: of the rotated keys and the values.  added: `(B, H, D)` rot(f(k)) - f(k), the sum, then the mean."""

    moments: Moments
    added: Tensor


class RotatedMoments(Round):
    """The means of mapped keys and of values, and the covariance of both, keys rotated."""

    def absorb(self, core: "MALA", tokens: Tokens, tile: Tile, done: Done) -> KeyMoments:
        """Over the tile's tokens."""
        k = mask_tokens(Features(tokens.k, "elu+1").mapped(), tokens.keep)
        turned = core.rotated(k, tile)
        return KeyMoments(central_absorb(turned, tokens.v, tokens.keep), (turned - k).sum(dim=1))

    def finish(self, core: "MALA", state: KeyMoments, done: Done) -> KeyMoments:
        """With the mean of what is added."""
        return KeyMoments(state.moments, state.added / state.moments.count.clamp(min=1)[:, None, None])


@register(
    "mala",
    formula="o_i = x_o * ((1 + 1/z_i) s rot(f(q_i)) mean(rot(f(k)) v^T) - z_i mean(v) + conv5x5(v)_i), "
    "z_i = s f(q_i) . mean(f(k)), s = d^(-1/2), f = elu + 1",
    latex=r"\begin{aligned} o_i &= \left( 1 + \frac{1}{z_i} \right) s \mathrm{rot}(f(q_i)) \mathrm{mean}_j("
    r"\mathrm{rot}(f(k_j)) v_j^\top) - z_i \mathrm{mean}_j(v_j) \cr "
    r"z_i &= s f(q_i) \cdot \mathrm{mean}_j(f(k_j)), \quad s = d^{-1/2}, \quad f = \mathrm{elu} + 1 \cr "
    r"\mathrm{out} &= \mathrm{proj}((o + \mathrm{conv}_{5 \times 5}(v)) \odot x_o) \end{aligned}",
    family="feature map",
    also=("MAViT",),
    complexity="O(N d^2)",
    paper=Paper("Rectifying Magnitude Neglect in Linear Attention", "2507.00698", "ICCV 2025"),
)
class MALA(GatedRotary):
    """Rotary linear attention normalised by a factor and an offset, with a convolution of v and a gate."""

    structure = Structure(stream=True)
    rounds = (RotatedMoments(),)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The factor times what the covariance gives, the mean of v by what is left of both terms, and the gate."""
        moments, added = done[0]
        q = Features(tile.inner(tokens.q), "elu+1").mapped()
        with full_precision(q):
            q = q * q.shape[-1] ** -0.5
            turned = self.rotated(q, dataclasses.replace(tile, halo=0))
            z = apply_state(q, (moments.k - added)[..., None]) + _EPS
            p = apply_state(turned, moments.k[..., None])
            apart = apply_state(turned - q, moments.k[..., None]) + apply_state(q, added[..., None])
            out = apply_state(turned, moments.covariance()) * (1 + 1 / z) + (p / z + apart) * moments.v[:, None]
        return self.gated(out, tokens, tile)
