"""TransNormer's DiagAttention: attention inside chunks of the sequence, for early layers.

Qin et al., "The Devil in Linear Transformer", EMNLP 2022 (arXiv 2210.10340), by its published code. The sequence, row
by row with prefix tokens in front, is cut into chunks of w tokens, the last one filled up with zeros. In each, with
s = d^(-1/2),

    o_i = sum_j softmax_j(s q_i . k_j) v_j          "softmax": the second published model
    o_i = r(sum_j relu(s q_i . k_j) v_j)            "relu": the first; r as in `transnormer`, all heads together

The zeros of the last chunk take part in its softmax, as published. What a token sees hangs on its place in the
sequence, so dropped tokens and padded batches are refused, and there are no states that merge. A causal form, with a
mask in each chunk, is left out.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Layout, accumulator, full_precision, unflatten

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core
from ..registry import Paper, register
from ..tokens import Tokens
from .transnormer import PUBLISHED, normed


@register(
    "transnormer_diag",
    formula="o_i = sum_j softmax_j(d^(-1/2) q_i . k_j) v_j, or r(sum_j relu(d^(-1/2) q_i . k_j) v_j), j in i's chunk",
    latex=r"o_i = \sum_{j \in \mathrm{chunk}(i)} \mathrm{softmax}_j(s q_i \cdot k_j) v_j, \quad \text{or } r \left( "
    r"\textstyle\sum_j \mathrm{relu}(s q_i \cdot k_j) v_j \right), \quad s = d^{-1/2}",
    family="window",
    complexity="O(N w d)",
    paper=Paper("The Devil in Linear Transformer", "2210.10340", "EMNLP 2022"),
)
class TransNormerDiag(Core):
    """Attention inside chunks of the sequence.

    Args:
        chunk: w.
        scores: "softmax", or "relu" with a norm behind it.
    """

    capabilities = Capabilities(prefix=True)
    structure = Structure(cost=Cost.WINDOWED)
    turns = "tokens"
    published = PUBLISHED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        chunk: int = 64,
        scores: Literal["softmax", "relu"] = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise LinsightError(f"chunk={chunk} of 'transnormer_diag' must be 1 or more; the published one is 64")
        self.num_heads, self.chunk, self.scores = num_heads, chunk, scores

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """Scores and sums in the accumulator's dtype."""
        dtype, n = accumulator(tokens.v.dtype), tokens.v.shape[1]
        pad = (n + self.chunk - 1) // self.chunk * self.chunk - n

        def chunked(x: Tensor) -> Tensor:  # (B, N, H, D) -> (B, H, chunks, w, D)
            return unflatten(F.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, pad)), 2, (-1, self.chunk))

        with full_precision(tokens.v):
            q, k, v = (chunked(x) for x in tokens[:3])
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = scores.softmax(dim=-1) if self.scores == "softmax" else scores.relu()
            out = (weights @ v).flatten(2, 3)[:, :, :n].transpose(1, 2)
            return (out if self.scores == "softmax" else normed(out)).to(tokens.v.dtype)
