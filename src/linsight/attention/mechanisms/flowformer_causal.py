"""Causal flow attention: `flowformer` where flows are those of the tokens so far.

Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows", ICML 2022 (arXiv 2202.06258), by its
published code for sequences. With f = sigmoid, t the number of tokens up to and with token t, e = 1e-6 on every
component,

    I_t = (f(q_t) + e) . (sum_{s <= t} f(k_s) + e)            O_t alike, of k_t and the sum of f(q_s)
    I'_t = (f(q_t) + e) . (sum_{s <= t} s f(k_s) / O_s + e) / t
    O'_t = (f(k_t) + e) . (sum_{s <= t} s f(q_s) / I_s + e) / t, clipped to [-1, 1]
    c_t = t exp(O'_t) / sum_{s <= t} exp(O'_s)
    o_t = sigmoid(I'_t) f(q_t) / I_t sum_{s <= t} f(k_s) (c_s v_s)^T

What a source weighs is settled when it comes, by those before it. So this is not the last token of `flowformer` on
tokens 1 to t, and a mechanism of its own; and the sums of some tokens depend on all before them, so there are no states
that merge, and no tiles. Dropped tokens are not there: those behind them count less.

The published code holds a matrix for every token; here there is one for each 64.
"""

import torch
from torch import Tensor

from linsight.ops import Layout, Tile, accumulator, causal_product, full_precision, mask_tokens

from ..capabilities import Capabilities, Structure
from ..core import Core
from ..registry import Paper, register
from ..tokens import Tokens
from .flowformer import Flowformer

_EPS = 1e-6


@register(
    "flowformer_causal",
    formula="o_t = sigmoid(I'_t) f(q_t) / I_t sum_{s<=t} f(k_s) (c_s v_s)^T, c_t = t exp(O'_t) / sum_{s<=t} exp(O'_s)",
    latex=r"\begin{aligned} o_t &= \sigma(\hat I_t) \frac{f(q_t)}{I_t} \sum_{s \le t} f(k_s) (c_s v_s)^\top, \quad c_t "
    r"= \frac{t e^{\hat O_t}}{\sum_{s \le t} e^{\hat O_s}}, \quad f = \sigma \cr "
    r"I_t &= f(q_t) \cdot \textstyle\sum_{s \le t} f(k_s), \quad O_t = f(k_t) \cdot \textstyle\sum_{s \le t} f(q_s) "
    r"\cr \hat I_t &= \tfrac{1}{t} f(q_t) \cdot \textstyle\sum_{s \le t} \frac{s f(k_s)}{O_s}, \quad \hat O_t = "
    r"\tfrac{1}{t} f(k_t) \cdot \textstyle\sum_{s \le t} \frac{s f(q_s)}{I_s} \end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("Flowformer: Linearizing Transformers with Conservation Flows", "2202.06258", "ICML 2022"),
)
class FlowformerCausal(Core):
    """Flow attention of each token with those before it."""

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(bidirectional=False)
    turns = "features"
    causal = True
    published = Flowformer.published

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """Outputs `(B, N, H, E)` of tokens in their order, row by row."""
        dtype, keep = accumulator(tokens.v.dtype), tokens.keep
        q, k = (mask_tokens(torch.sigmoid(x.to(dtype)), keep) for x in tokens[:2])
        here = torch.ones_like(k[:, :, :1, 0]) if keep is None else keep.to(dtype)[..., None]
        place = here.cumsum(dim=1).clamp(min=1)  # (B, N, 1)
        with full_precision(q):
            incoming, outgoing = (flow(x, other.cumsum(dim=1)) for x, other in ((q, k), (k, q)))
            sinks, sources = (
                flow(x, (other * (place / own)[..., None]).cumsum(dim=1)) / place
                for x, other, own in ((q, k, outgoing), (k, q, incoming))
            )
            weights = mask_tokens(sources.clamp(-1, 1).exp(), keep)
            total = weights.cumsum(dim=1)
            share = place * weights / torch.where(total > 0, total, torch.ones_like(total))
            v = mask_tokens(tokens.v, keep).to(dtype) * share[..., None]
            q = q * (torch.sigmoid(sinks) / incoming)[..., None]
            tile = Tile.whole(layout.grid, layout.sizes)
            out = causal_product(self.by_place(q, tile), self.by_place(k, tile), v)
            return out.to(tokens.q.dtype)


def flow(x: Tensor, other: Tensor) -> Tensor:
    """The flow `(B, N, H)` between tokens `(B, N, H, D)` and the sums of the other side so far."""
    return ((x + _EPS) * (other + _EPS)).sum(dim=-1)
