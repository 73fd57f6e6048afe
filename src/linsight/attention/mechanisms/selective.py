"""Selective self-attention: softmax attention whose temperature falls with the number of keys that a query sees.

"Selective Attention: Enhancing Transformer through Principled Context Control", NeurIPS 2024, by its published code,
which has the part that depends on the position: in the causal form query i, from 1, sees i keys, and

    o_i = sum_j softmax_j(tau_i d^(-1/2) q_i . k_j) v_j,   tau_i = 1 + exp(-e^beta) ln(n_i),   n_i = i

with a learnable beta for each layer, 1.5 at the start. The tokens of an image have no order, so without `causal` n is
the number of keys that all queries see: scores of a larger image are sharpened, as its softmax has more terms. The
paper's other part, a temperature made from the token, has no published code and is not here. Queries are multiplied in
float32 (float64 for float64), and a bias on the scores is not.
"""

import torch
from torch import Tensor, nn

from linsight.ops import Layout, accumulator, full_precision

from ..core import Rename
from ..parts.seen import count_seen, seen_keys
from ..registry import Paper, register
from ..tokens import Tokens
from .softmax import Softmax


@register(
    "selective",
    formula="o_i = sum_j softmax_j(tau_i d^(-1/2) q_i . k_j) v_j, tau_i = 1 + exp(-exp(beta)) ln(n_i)",
    latex=r"o_i = \sum_j \mathrm{softmax}_j(\tau_i d^{-1/2} q_i \cdot k_j) v_j, \quad \tau_i = 1 + \exp(-e^\beta) "
    r"\ln n_i",
    family="scores",
    complexity="O(N^2 d)",
    paper=Paper("Selective Attention: Enhancing Transformer through Principled Context Control", "", "NeurIPS 2024"),
)
class Selective(Softmax):
    """Scaled dot-product attention with a temperature for each number of keys.

    Args:
        causal: token i sees tokens j <= i only, as published.
    """

    published = (Rename("c_attn.", "qkv."), Rename("c_proj.", "proj."), Rename("beta", "core.beta"))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)
        self.beta = nn.Parameter(torch.full((), 1.5, device=device, dtype=dtype))

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """Softmax attention of queries times tau."""
        dtype = accumulator(tokens.q.dtype)
        q, k, v = (x.to(dtype) for x in tokens[:3])
        count = count_seen(k, seen_keys(q, k, tokens.keep, causal=self.causal, bias=score_bias))
        tau = 1 + torch.exp(-self.beta.to(dtype).exp()) * count.log()
        with full_precision(q):
            if score_bias is not None and score_bias.dtype != torch.bool:
                score_bias = score_bias.to(dtype)
            wide = tokens._replace(q=(q.transpose(1, 2) * tau).transpose(1, 2), k=k, v=v)
            return super().forward(wide, layout, score_bias=score_bias).to(tokens.v.dtype)
