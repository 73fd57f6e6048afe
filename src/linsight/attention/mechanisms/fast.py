"""FAST: kernel attention whose weights are a polynomial of the cosine of query and key.

"FAST: Factorizable Attention for Speeding up Transformers" (arXiv 2402.07901), which has no published code. With
f(x) = sum_l x^l / l! to the order p of 1 or 2,

    o_i = sum_j f(q^_i . k^_j) v_j / (sum_j f(q^_i . k^_j) + 1e-6)

f(q . k) = phi(q) . phi(k) with phi(x) = (1, x, x_a x_b for a < b, x_a^2 / sqrt(2)) exactly: no random features. The
normalisation of a token is described there without its details: "l2" divides by the norm, and all weights are positive
(order 2) or not negative (order 1); "layer" takes the mean away and divides by the deviation, which gives sharper
weights, and with order 1 negative ones, so that is refused. No dropout is in it. The causal form sums over j <= i.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Features, Tile, accumulator, square_features

from ..capabilities import Capabilities, Structure
from ..parts.kernel import KernelCore
from ..registry import Paper, register
from ..rounds import Done


@register(
    "fast",
    formula="o_i = sum_j f(q^_i . k^_j) v_j / (sum_j f(q^_i . k^_j) + eps), f(x) = 1 + x + x^2 / 2, x^ = x / |x|",
    latex=r"o_i = \frac{\sum_j f(\hat q_i \cdot \hat k_j) v_j}{\sum_j f(\hat q_i \cdot \hat k_j) + \varepsilon}, "
    r"\quad f(x) = \sum_{l=0}^p \frac{x^l}{l!}, \quad \hat x = \frac{x}{\lVert x \rVert}",
    family="feature map",
    complexity="O(N d^3)",
    paper=Paper("FAST: Factorizable Attention for Speeding up Transformers", "2402.07901"),
)
class Fast(KernelCore):
    """Kernel attention with all products of one or two channels as features.

    Args:
        order: p, of the polynomial.
        norm: of each head of queries and keys: "l2" to length 1, "layer" to mean 0 and deviation 1.
        causal: token i sees tokens j <= i only; then there are no tiles.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True, causal=True)
    turns = "tokens"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        order: Literal[1, 2] = 2,
        norm: Literal["l2", "layer"] = "l2",
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if order == 1 and norm == "layer":
            raise LinsightError(
                "order=1 with norm='layer' of 'fast' gives negative weights: pass norm='l2', or order=2"
            )
        if norm == "layer":
            self.unturned = "the mean and deviation of a turned head depend on its place: pass norm='l2'"
        self.num_heads, self.width = num_heads, dim // num_heads
        self.order, self.norm, self.causal = order, norm, causal

    def features(self, name: Literal["q", "k"], x: Tensor, tile: Tile, done: Done) -> Features:
        """phi, of queries and keys alike, in the accumulator's dtype."""
        x = x.to(accumulator(x.dtype))
        x = F.normalize(x, dim=-1) if self.norm == "l2" else F.layer_norm(x, (self.width,))
        parts = [torch.ones_like(x[..., :1]), x]
        if self.order == 2:
            parts.append(square_features(x))
        return Features(torch.cat(parts, dim=-1))
