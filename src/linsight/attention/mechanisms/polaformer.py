"""PolaFormer: linear attention that reads keys of the same sign and of the opposite sign apart, by learnable powers.

Meng et al., "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", ICLR 2025 (arXiv 2501.15061), by its
published code. With t a learnable vector of C channels, P a table of learnable positions on the grid of the keys, w
learnable powers (heads, d), x+ = relu(x) and x- = relu(-x), per head and with the means over the N keys,

    q <- q / softplus(t),   k <- (k + P) / softplus(t),   p = 1 + alpha sigmoid(w)
    Q_same = [q+^p | q-^p],   Q_opp = [q-^p | q+^p],   K = [k+^p | k-^p],   v = [v_1 | v_2]
    o_same = Q_same mean(K v_1^T) / (Q_same . mean(K) + 1e-6),   o_opp alike of Q_opp and v_2
    out = proj(([o_same | o_opp] + conv(v)) * g)

where conv is a depthwise k x k convolution whose kernel all heads share and g a fourth projection of the input, without
an activation. K is the same in both, so there is one state. Powers reach 1 + alpha: all is computed in float32 (float64
for float64).

Keys of a reduced grid, as in PVT: their v is brought back to all N tokens for the convolution by linear interpolation
along the flattened sequence. Prefix tokens, of which the publication has none, are read and absorbed as all others,
without a position and without the convolution.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Features, LinearState, Tile, accumulator, linear_read

from ..core import Rename
from ..parts.placed import PlacedKernel
from ..parts.token_conv import add_behind
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens, split_heads


@register(
    "polaformer",
    formula="o_same = Q mean(K v_1^T) / (Q . mean(K) + eps), o_opp = Q' mean(K v_2^T) / (Q' . mean(K) + eps), "
    "Q = [q+ | q-]^p, Q' = [q- | q+]^p, K = [k+ | k-]^p; out = ([o_same | o_opp] + conv(v)) * g",
    latex=r"\begin{aligned} o^s_i &= \frac{Q^s_i \mathrm{mean}_j(K_j v_{1j}^\top)}{Q^s_i \cdot \mathrm{mean}_j(K_j) + "
    r"10^{-6}}, \quad o^o_i = \frac{Q^o_i \mathrm{mean}_j(K_j v_{2j}^\top)}{Q^o_i \cdot \mathrm{mean}_j(K_j) + "
    r"10^{-6}} \cr Q^s &= [q^+, q^-]^p, \quad Q^o = [q^-, q^+]^p, \quad K = [k^+, k^-]^p, \quad v = [v_1, v_2] \cr "
    r"\mathrm{out} &= \mathrm{proj}(([o^s, o^o] + \mathrm{conv}(v)) \odot g) \end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("PolaFormer: Polarity-aware Linear Attention for Vision Transformers", "2501.15061", "ICLR 2025"),
)
class PolaFormer(PlacedKernel):
    """Linear attention by polarity, with learnable powers, a depthwise convolution of v and a gate.

    Args:
        alpha: powers are between 1 and 1 + alpha.
        kernel_size: side of the depthwise kernel, odd.
    """

    turns = "features"
    alike = 2
    projections = "qkvx"
    open_gate = 1.0
    reduced_projections = "qx_kv"
    published = (
        Rename("power", "core.power"),
        Rename("scale", "core.scale"),
        Rename("positional_encoding", "core.positions"),
        Rename("dwc.", "core.dwc."),
        Rename("qkvg.", "qkv."),
        Rename("qg.", "qx."),
        Rename("kv.", "kv."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        alpha: float = 4,
        kernel_size: int = 5,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = dim // num_heads
        if width % 2:
            raise LinsightError(f"'polaformer' halves the values of a head: its width must be even, not {width}")
        if not alpha > 0:
            raise LinsightError(f"alpha={alpha} of 'polaformer' must be above 0; published models use 4")
        super().__init__(dim, num_heads, kernel_size=kernel_size, grid=grid, device=device, dtype=dtype)
        self.alpha = alpha
        self.extra_dim = dim
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, device=device, dtype=dtype))
        self.power = nn.Parameter(torch.zeros(1, num_heads, 1, width, device=device, dtype=dtype))

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """Q_same, or K with its positions."""
        x = x.to(accumulator(x.dtype))
        if name == "k":
            x = self.at_places(x, tile)
        scale, power = (parameter.to(x.dtype) for parameter in (self.scale, self.power))
        x = x / F.softplus(split_heads(scale, self.num_heads))
        power = 1 + self.alpha * power.transpose(1, 2).sigmoid()
        return Features(torch.cat([x, -x], dim=-1).relu() ** torch.cat([power, power], dim=-1))

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Both streams: that of opposite signs by the state with the halves of its keys exchanged."""
        if tokens.extra is None:
            raise LinsightError("the gate of 'polaformer' is a projection of its own: projections='qkvx' or 'qx_kv'")
        state: LinearState = done[-1]
        width = tokens.q.shape[-1]
        q = self.placed_features("q", tile.inner(tokens.q), dataclasses.replace(tile, halo=0), done)
        same, opposite = state.kv.split(width // 2, dim=-1)
        streams = LinearState(same, state.k), LinearState(opposite.roll(width, dims=2), state.k.roll(width, dims=2))
        out = torch.cat([linear_read(q, each, self.eps) for each in streams], dim=-1)
        out = add_behind(out, self.local(tokens, tile), tile.prefix)
        return (out * split_heads(tile.inner(tokens.extra), self.num_heads)).to(tokens.q.dtype)
