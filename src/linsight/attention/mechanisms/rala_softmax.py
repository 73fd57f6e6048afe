"""The late stages of RALA's published models: rotary softmax attention in the same gated layer, at O(N^2).

Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025 (arXiv 2411.07635), by its published code.
Per head, with the rotation, the convolution and the gate x_o of `rala`, and no feature map,

    out = proj((o + conv5x5(v)) * x_o),   o_i = sum_j softmax_j(d^(-1/2) rot(q_i) . rot(k_j)) v_j

It has no state that merges, so no rounds. Everything is computed in float32 (float64 for float64).
"""

from torch import Tensor

from linsight.ops import Layout, Tile, accumulator, gather_pooled

from ..capabilities import Cost, Structure
from ..parts.gated_rotary import GatedRotary
from ..registry import Paper, register
from ..tokens import Tokens


@register(
    "rala_softmax",
    formula="o_i = x_o * (sum_j softmax_j(d^(-1/2) rot(q_i) . rot(k_j)) v_j + conv5x5(v)_i)",
    latex=r"\begin{aligned} o_i &= \sum_j \mathrm{softmax}_j(d^{-1/2} \mathrm{rot}(q_i) \cdot \mathrm{rot}(k_j)) v_j "
    r"\cr "
    r"\mathrm{out} &= \mathrm{proj}((o + \mathrm{conv}_{5 \times 5}(v)) \odot x_o) \end{aligned}",
    family="scores",
    complexity="O(N^2 d)",
    paper=Paper("Breaking the Low-Rank Dilemma of Linear Attention", "2411.07635", "CVPR 2025"),
)
class RALASoftmax(GatedRotary):
    """Rotary softmax attention with a convolution of v and a gate."""

    structure = Structure(cost=Cost.QUADRATIC)

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """Softmax over the keys, the convolution of v, and the gate."""
        tile = Tile.whole(layout.grid, layout.sizes)
        q, k = (self.rotated(x.to(accumulator(x.dtype)), tile) for x in tokens[:2])
        out = gather_pooled(q, k, tokens.v, None, tokens.keep).transpose(1, 2)
        return self.gated(out, tokens, tile)
