"""Reversed attention: tokens send what they have to those that they attend to, in shares that sum to 1, at O(N^2).

Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", CVPR 2023 (arXiv
2304.03282), of which no code was published. The paper's summary tells the parts, and the maps of selector and
controller here are the plainest that fit. Per head h,

    o_ih = sum_j a_jih P_jh M_j v_jh,   a_jih = softmax_i(d^(-1/2) q_jh . k_ih),   P_j = softmax_h(W_P x_j + b_P),
                                        M_j = sigmoid(w_M . x_j + b_M)

a_j is what softmax attention of token j has over all i, so j is the child and i its parents: it is the transpose that
reads values, and over the messages that a token receives there is no norm. P selects the heads that a token sends by,
and M how much it sends. Without both it is softmax attention normalised over queries instead of keys.
Everything is computed in float32 (float64 for float64).
"""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.ops import Layout, accumulator, full_precision, mask_tokens

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core
from ..parts.wide import WideLinear
from ..registry import Paper, register
from ..tokens import Tokens, merge_heads


@register(
    "dependencyvit",
    formula="o_i = sum_j softmax_i(d^(-1/2) q_j . k_i) P_j M_j v_j, P_j = softmax over heads, M_j = sigmoid",
    latex=r"o_{ih} = \sum_j \mathrm{softmax}_i(d^{-1/2} q_{jh} \cdot k_{ih}) P_{jh} M_j v_{jh}, \quad "
    r"P_j = \mathrm{softmax}_h(W_P x_j), \quad M_j = \sigma(w_M \cdot x_j)",
    family="scores",
    complexity="O(N^2 d)",
    paper=Paper("Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", "2304.03282"),
)
class DependencyViT(Core):
    """Softmax attention whose transpose carries the values.

    Args:
        selector: a share of each head for each token that sends, which sum to 1.
        controller: a gate on what a token sends.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(cost=Cost.QUADRATIC)
    turns = "tokens"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        selector: bool = True,
        controller: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.selector: nn.Module | None = WideLinear(dim, num_heads, **factory) if selector else None
        self.controller: nn.Module | None = WideLinear(dim, 1, **factory) if controller else None

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """The sum of messages that each token receives, `(B, N, H, d)`."""
        dtype = accumulator(tokens.v.dtype)
        q, k = (mask_tokens(x, tokens.keep).to(dtype).transpose(1, 2) for x in tokens[:2])  # (B, H, N, d)
        with full_precision(q):
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            if tokens.keep is not None:  # finite: all may be dropped
                scores = scores.masked_fill(~tokens.keep[:, None, None], torch.finfo(dtype).min)
            shares = scores.softmax(dim=-1)
            return (shares.transpose(-2, -1) @ self.messages(tokens)).transpose(1, 2).to(tokens.v.dtype)

    def messages(self, tokens: Tokens) -> Tensor:
        """P M v, `(B, H, N, d)`, 0 of tokens that are not kept, in the accumulator's dtype."""
        v = mask_tokens(tokens.v, tokens.keep).to(accumulator(tokens.v.dtype))
        x = mask_tokens(merge_heads(tokens.v) if tokens.x is None else tokens.x, tokens.keep).to(v.dtype)
        if self.selector is not None:
            v = v * self.selector(x).softmax(dim=-1)[..., None]
        if self.controller is not None:
            v = v * self.controller(x).sigmoid()[..., None]
        return v.transpose(1, 2)
