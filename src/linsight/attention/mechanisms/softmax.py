"""Softmax attention, the O(N^2) baseline: o_i = sum_j softmax_j(s q_i . k_j) v_j, s = d^(-1/2).

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1; computed by
`torch.nn.functional.scaled_dot_product_attention`. It has no state that merges, so no rounds.
"""

import torch
from torch import Tensor

from linsight.ops import Layout, attend

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core
from ..registry import Paper, register
from ..tokens import Tokens


@register(
    "softmax",
    formula="o_i = sum_j softmax_j(d^(-1/2) q_i . k_j) v_j",
    latex=r"o_i = \sum_j \mathrm{softmax}_j(s q_i \cdot k_j) v_j, \quad s = d^{-1/2}",
    family="scores",
    also=("MHSA", "SDPA"),
    complexity="O(N^2 d)",
    paper=Paper("Attention Is All You Need", "1706.03762", "NeurIPS 2017"),
)
class Softmax(Core):
    """Scaled dot-product attention.

    Args:
        causal: token i sees tokens j <= i only.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, score_bias=True, prefix=True)
    structure = Structure(reduced=True, causal=True, cost=Cost.QUADRATIC)
    turns = "tokens"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """`score_bias` broadcasts to `(B, H, M, N)` and is added to the scaled scores."""
        q, k, v = (t.to(tokens.v.dtype).transpose(1, 2) for t in tokens[:3])  # (B, H, N, D)
        mask = score_bias
        if tokens.keep is not None:
            keep = tokens.keep[:, None, None, :]
            mask = keep if mask is None else mask.masked_fill(~keep, float("-inf"))
            v = v.masked_fill(~tokens.keep[:, None, :, None], 0)  # 0 * NaN is NaN
            k = k.masked_fill(~tokens.keep[:, None, :, None], 0)
        if self.causal and mask is not None:
            triangle = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            mask = mask & triangle if mask.dtype == torch.bool else mask.masked_fill(~triangle, float("-inf"))
        out = attend(q, k, v, mask, causal=self.causal and mask is None)
        return out.transpose(1, 2)
