"""Sigmoid attention: weights that are not normed over the keys, o_i = sum_j sigmoid(e^t d^(-1/2) q_i . k_j + b) v_j.

Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (arXiv 2409.04431). Its cost is that
of a score matrix. The bias recommended is b = -ln N: without it the sum over N keys is large when training begins, and
with that of another size it is too large or small there. So by default N is counted, for each query: the keys that it
sees. Published layers hold a bias, and t, as buffers; `bias="stored"` takes the one that a checkpoint holds. A bias on
the scores comes before e^t, as published. Weights and sums are made in float32 (float64 for float64).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from linsight.ops import Layout, accumulator, full_precision, mask_tokens

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Rename
from ..parts.seen import count_seen, seen_keys
from ..parts.wide import WideLayerNorm
from ..registry import Paper, register
from ..tokens import Tokens


@register(
    "sigmoid",
    formula="o_i = sum_j sigmoid(d^(-1/2) q_i . k_j - ln N) v_j",
    latex=r"o_i = \sum_j \sigma(d^{-1/2} q_i \cdot k_j + b) v_j, \quad b = -\ln N",
    family="scores",
    complexity="O(N^2 d)",
    paper=Paper("Theory, Analysis, and Best Practices for Sigmoid Self-Attention", "2409.04431", "2024"),
)
class Sigmoid(Core):
    """Elementwise sigmoid of the scores.

    Args:
        bias: "count" is -ln of the number of keys that a query sees, "stored" a buffer, which starts at 0.
        qk_norm: LayerNorm of each head's queries and keys.
        causal: token i sees tokens j <= i only.
    """

    attn_temp: Tensor
    attn_bias: Tensor
    capabilities = Capabilities(keep=True, sizes=True, cross=True, score_bias=True, prefix=True)
    structure = Structure(reduced=True, causal=True, cost=Cost.QUADRATIC)
    turns = "tokens"
    published = tuple(Rename(name, f"core.{name}") for name in ("attn_temp", "attn_bias", "q_norm.", "k_norm."))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        bias: Literal["count", "stored"] = "count",
        qk_norm: bool = False,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        if qk_norm:
            self.unturned = "a norm of turned queries and keys depends on their places: pass qk_norm=False"
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.counted = bias == "count"
        self.register_buffer("attn_temp", torch.zeros(1, **factory))
        if not self.counted:
            self.register_buffer("attn_bias", torch.zeros(1, **factory))
        self.q_norm, self.k_norm = (
            WideLayerNorm(dim // num_heads, **factory) if qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """`score_bias` broadcasts to `(B, H, M, N)` and is added to the scaled scores; False in a mask is unseen."""
        dtype = accumulator(tokens.v.dtype)
        seen = seen_keys(tokens.q, tokens.k, tokens.keep, causal=self.causal, bias=score_bias)
        k, v = (mask_tokens(x, tokens.keep).to(dtype) for x in (tokens.k, tokens.v))
        bias = self.attn_bias.to(dtype) if not self.counted else -count_seen(k, seen).log()
        with full_precision(k):
            q, k, v = (x.transpose(1, 2) for x in (self.q_norm(tokens.q.to(dtype)), self.k_norm(k), v))
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if score_bias is not None and score_bias.dtype != torch.bool:
                scores = scores + score_bias
            scores = scores * self.attn_temp.to(dtype).exp() + bias
            if seen is not None:
                scores = scores.masked_fill(~seen, float("-inf"))
            return (scores.sigmoid() @ v).transpose(1, 2).to(tokens.v.dtype)
