"""Linear attention: o_i = phi(q_i) S / (phi(q_i) . z + eps), S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j).

Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with
Linear Attention", ICML 2020, equations 5 to 7. phi is elu + 1 there; ReLU is the other plain map of
the vision papers. No scale, eps = 1e-6 on the denominator; the causal form sums over j <= i.
"""

from typing import Literal

import torch
from torch import Tensor

from linsight.errors import CapabilityError
from linsight.ops import (
    Features,
    Layout,
    LinearState,
    State,
    Tile,
    causal_linear_attention,
    linear_absorb,
    linear_read,
)

from ..core import Capabilities, Core, Tokens
from ..registry import Paper, register


@register(
    "linear",
    formula="o_i = phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps)",
    complexity="O(N d^2)",
    paper=Paper("Transformers are RNNs", "2006.16236", "ICML 2020"),
)
class Linear(Core):
    """Kernel attention with a plain feature map.

    Args:
        feature_map: phi.
        causal: token i sees tokens j <= i only; then there are no tiles.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, reduced=True, stream=True, prefix=True, causal=True)
    eps = 1e-6

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature_map: Literal["elu+1", "relu"] = "elu+1",
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.feature_map = feature_map

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> LinearState:
        """sum phi(k) v^T and sum phi(k)."""
        if self.causal:
            raise CapabilityError("the causal form of 'linear' depends on order and has no tiles: pass causal=False")
        return linear_absorb(Features(tokens.k, self.feature_map), tokens.v, tokens.keep)

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """phi(q) against the state."""
        return linear_read(Features(tokens.q, self.feature_map), done[0], self.eps, dtype=tokens.q.dtype)

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """The rounds, or the running sums of the causal form."""
        if not self.causal:
            return super().forward(tokens, layout, context_layout=context_layout)
        k = self._map(tokens.k)
        if tokens.keep is not None:
            keep = ~tokens.keep[..., None, None]
            k, tokens = k.masked_fill(keep, 0), tokens._replace(v=tokens.v.masked_fill(keep, 0))
        return causal_linear_attention(self._map(tokens.q), k, tokens.v, eps=self.eps)

    def _map(self, x: Tensor) -> Tensor:
        return Features(x, self.feature_map).mapped()
