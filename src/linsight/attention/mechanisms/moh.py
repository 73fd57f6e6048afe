"""MoH: softmax attention whose output is a weighted sum of heads, of which each token keeps some.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842), by the published code of its
diffusion transformers. Per head h, with a gate g_h of each token's own,

    o_i = W_o [g_1(x_i) a_i1, ..., g_H(x_i) a_iH] + b,   a_ih = sum_j softmax_j(d^(-1/2) q_ih . k_jh) v_jh

The gates, and the loss by which heads are used alike, are those of `parts.head_gates`: the first heads are shared, of
the others each token keeps those with the largest gates, so outputs jump where two of them cross. Heads may have a
width that has nothing to do with that of the tokens. Those of the paper's vision models are in `transnext`.
"""

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Layout

from ..core import Rename
from ..parts.head_gates import HeadGates
from ..registry import Paper, register
from ..tokens import Tokens, merge_heads
from .softmax import Softmax

PAPER = Paper("MoH: Multi-Head Attention as Mixture-of-Head Attention", "2410.11842")


@register(
    "moh",
    formula="o_i = [g_h(x_i) sum_j softmax_j(d^(-1/2) q_i . k_j) v_j] over heads h, g_h(x_i) = 0 of heads not kept",
    latex=r"o_i = \left[ g_h(x_i) \sum_j \mathrm{softmax}_j(d^{-1/2} q_{ih} \cdot k_{jh}) v_{jh} \right]_{h = 1}^{H}, "
    r"\quad g_h(x_i) = 0 \text{ of heads not kept}",
    family="scores",
    complexity="O(N^2 d)",
    paper=PAPER,
)
class MoH(Softmax):
    """Scaled dot-product attention with a gate for each token and head.

    Args:
        shared_heads: S, heads that every token has; None for a quarter of them.
        routed_heads: R, those that a token keeps of the others; None for half of these.
        head_dim: the width of a head; 0 for that of the tokens over the number of heads.
        causal: token i sees tokens j <= i only.
    """

    published = (Rename("wg", "core.gates.wg"),)
    steps = "which heads are kept"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        head_dim: int = 0,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)
        if head_dim < 0:
            raise LinsightError(f"head_dim={head_dim} of 'moh' must be 1 or more, or 0 for dim over num_heads")
        if head_dim:
            self.inner_dim = self.out_dim = head_dim * num_heads
        self.gates = HeadGates(dim, num_heads, shared_heads, routed_heads, owner="moh", device=device, dtype=dtype)

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """Softmax attention, each head times its gate; `score_bias` as of `softmax`."""
        dtype = tokens.v.dtype
        wide = tokens._replace(v=tokens.v.to(torch.promote_types(tokens.q.dtype, dtype)))  # turned ones are float32
        out = super().forward(wide, layout, score_bias=score_bias)
        x = merge_heads(tokens.q) if tokens.x is None else tokens.x
        return self.gates(out, x, tokens.keep if context_layout is None else None).to(dtype)
