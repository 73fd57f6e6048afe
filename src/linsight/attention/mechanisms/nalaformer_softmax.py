"""The late stages of NaLaFormer: rotary softmax attention in the layer of `nalaformer`, at O(N^2).

Meng et al., "Norm x Direction: Restoring the Missing Query Norm in Vision Linear Attention", ICML 2026 (arXiv
2506.21137), by its published code. Per head, with the rotation of `rala`, and no feature map,

    o_i = sum_j softmax_j(d^(-1/2) rot(q_i) . rot(k_j)) v_j
    out = proj(LN(o + conv5x5(v)) * SiLU(g))

where LN is over all channels and g a fourth projection of the input, as in `nalaformer`. It has no state that merges,
so no rounds. All up to the gate is computed in float32 (float64 for float64).
"""

from torch import Tensor

from linsight.ops import Layout, Tile, accumulator, gather_pooled

from ..capabilities import Cost, Structure
from ..registry import Paper, register
from ..tokens import Tokens
from .nalaformer import NaLaFormer


@register(
    "nalaformer_softmax",
    formula="o_i = sum_j softmax_j(d^(-1/2) rot(q_i) . rot(k_j)) v_j; out = LN(o + conv5x5(v)) * SiLU(g)",
    latex=r"\begin{aligned} o_i &= \sum_j \mathrm{softmax}_j(d^{-1/2} \mathrm{rot}(q_i) \cdot \mathrm{rot}(k_j)) v_j "
    r"\cr "
    r"\mathrm{out} &= \mathrm{proj}(\mathrm{LN}(o + \mathrm{conv}_{5 \times 5}(v)) \odot \mathrm{SiLU}(g)) "
    r"\end{aligned}",
    family="scores",
    complexity="O(N^2 d)",
    paper=Paper(
        "Norm x Direction: Restoring the Missing Query Norm in Vision Linear Attention", "2506.21137", "ICML 2026"
    ),
)
class NaLaFormerSoftmax(NaLaFormer):
    """Rotary softmax attention, normed and gated behind a convolution of v."""

    structure = Structure(cost=Cost.QUADRATIC)
    rounds = ()  # type: ignore[assignment]

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """Softmax over the keys, the convolution of v, the norm and the gate."""
        tile = Tile.whole(layout.grid, layout.sizes)
        q, k = (self.rotated(x.to(accumulator(x.dtype)), tile) for x in tokens[:2])
        out = gather_pooled(q, k, tokens.v, None, tokens.keep).transpose(1, 2)
        return self.gated(out, tokens, tile)
