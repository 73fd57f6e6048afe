"""Nexus: softmax attention of queries and keys that inner attention over the same tokens has made, at O(m N^2).

"Nexus: Higher-Order Attention Mechanisms in Transformers" (arXiv 2512.03377), of which there is no published code: its
abstract says that queries and keys come of nested self-attention instead of static projections, with weights shared by
all levels. The form here has no further parameters. Per head, with s = d^(-1/2),

    Q_0 = X W_q,  K_0 = X W_k,   P_r = softmax(s Q_(r-1) K_(r-1)^T),   Q_r = P_r Q_(r-1),  K_r = P_r K_(r-1)
    o = softmax(s Q_(m-1) K_(m-1)^T) V

with order m, of which 1 is plain attention. Averages of averages come ever closer to the mean of all tokens, and logits
become flat; with `residual` both are added to what they are made of. A bias on the scores is that of each level. A
causal form would be another function, whose inner attention sees the past of each token and not that of the reader.
Everything is computed in float32 (float64 for float64).
"""

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Layout, accumulator, full_precision

from ..registry import Paper, register
from ..tokens import Tokens
from .softmax import Softmax


@register(
    "nexus",
    formula="o = softmax(s Q_(m-1) K_(m-1)^T) V, [Q_r, K_r] = softmax(s Q_(r-1) K_(r-1)^T) [Q_(r-1), K_(r-1)]",
    latex=r"o = \mathrm{softmax}(s Q_{m-1} K_{m-1}^\top) V, \quad [Q_r, K_r] = \mathrm{softmax}(s Q_{r-1} "
    r"K_{r-1}^\top) [Q_{r-1}, K_{r-1}]",
    family="scores",
    complexity="O(m N^2 d)",
    paper=Paper("Nexus: Higher-Order Attention Mechanisms in Transformers", "2512.03377"),
)
class Nexus(Softmax):
    """Scaled dot-product attention of a higher order.

    Args:
        order: m; 1 is plain attention.
        residual: inner attention is added to the queries and keys that it is of.
    """

    capabilities = Softmax.capabilities._replace(cross=False)
    structure = Softmax.structure._replace(reduced=False, causal=False)
    turns = ""  # type: ignore[assignment]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        order: int = 2,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype)
        if order < 1:
            raise LinsightError(f"order={order} of 'nexus' must be 1, for plain attention, or more")
        self.order, self.residual = order, residual

    def forward(  # type: ignore[override]
        self, tokens: Tokens, layout: Layout, *, score_bias: Tensor | None = None
    ) -> Tensor:
        """All levels; `score_bias` as of `softmax`."""
        dtype = accumulator(tokens.v.dtype)
        q, k, v = (x.to(dtype) for x in tokens[:3])
        if score_bias is not None and score_bias.dtype != torch.bool:
            score_bias = score_bias.to(dtype)
        with full_precision(q):
            for _ in range(self.order - 1):
                level = tokens._replace(q=q, k=k, v=torch.cat([q, k], dim=-1))
                made = super().forward(level, layout, score_bias=score_bias).chunk(2, dim=-1)
                q, k = (old + new for old, new in zip((q, k), made, strict=True)) if self.residual else made
            out = super().forward(tokens._replace(q=q, k=k, v=v), layout, score_bias=score_bias)
        return out.to(tokens.v.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, order={self.order}"
