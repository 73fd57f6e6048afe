"""cosFormer: ReLU kernel attention whose weights fall with the distance in the sequence, as a cosine.

Qin et al., "cosFormer: Rethinking Softmax in Attention", ICLR 2022 (arXiv 2202.08791), by its published code. With r =
relu, t_i = (pi / 2) (i + 1) / m for the token at place i from 0, and m the number of tokens,

    o_i = q~_i S / max(q~_i . z, 1e-6),   S = sum_j k~_j v_j^T,   z = sum_j k~_j
    q~_i = [r(q_i) sin t_i | r(q_i) cos t_i],   k~_j alike,   so   q~_i . k~_j = r(q_i) . r(k_j) cos(t_i - t_j)

There is no scale. A query that ReLU makes 0 reads 0. The causal form sums over j <= i, with m the length of all tokens.

The sequence is the grid row by row, prefix tokens in front; published is one for text alone. Every weight depends on
m: so an image of a padded batch has its own, and dropped tokens are refused, for without them all places and m would be
others; a context is refused, too, since its sums would need the number of queries (published is the larger number of
the two). `length` sets m, as where a sequence is read before its end is known.
"""

import math
from typing import Any

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Features, Tile, accumulator, apply_state, causal_products, full_precision, traced

from ..capabilities import Capabilities, Structure
from ..core import Rename
from ..parts.kernel import KernelCore
from ..parts.sequence import places
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens

_LEAST = 1e-6  # of what is below the line


@register(
    "cosformer",
    formula="o_i = sum_j w_ij v_j / max(sum_j w_ij, eps), w_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j)/N)",
    latex=r"o_i = \frac{\sum_j w_{ij} v_j}{\max(\sum_j w_{ij}, 10^{-6})}, \quad w_{ij} = \mathrm{relu}(q_i) \cdot "
    r"\mathrm{relu}(k_j) \cos \left( \frac{\pi}{2} \cdot \frac{i - j}{N} \right)",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("cosFormer: Rethinking Softmax in Attention", "2202.08791", "ICLR 2022"),
)
class CosFormer(KernelCore):
    """ReLU kernel attention, re-weighted by a cosine of the distance in the sequence.

    Args:
        causal: token i sees tokens j <= i only; then there are no tiles.
        length: m, at least the number of tokens; 0 is that number, of each image.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    placed = True
    structure = Structure(stream=True, causal=True)
    projections = "q_k_v"
    published = (*(Rename(f"{name}_proj.", f"{name}.") for name in "qkv"), Rename("out_proj.", "proj."))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        length: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if length < 0:
            raise LinsightError(f"length={length} of 'cosformer' must be a number of tokens, or 0 for each image's")
        self.num_heads = num_heads
        self.causal = causal
        self.length = length

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """q~ or k~."""
        x = x.to(accumulator(x.dtype)).relu()
        place, total = places(tile, x.device)
        if self.length:
            if not traced() and tile.grid.tokens > self.length:
                raise LinsightError(f"{tile.grid.tokens} tokens are more than length={self.length} of 'cosformer'")
            total = torch.full_like(total, self.length)
        angle = ((place + 1).to(x.dtype) / total * (math.pi / 2))[..., None, None]
        return Features(torch.cat([x * angle.sin(), x * angle.cos()], dim=-1))

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """q~ against both sums."""
        q, state = self.features("q", tokens.q, tile, done).mapped(), done[-1]
        with full_precision(q):
            below = apply_state(q, state.k[..., None])
            return (apply_state(q, state.kv) / below.clamp(min=_LEAST)).to(tokens.q.dtype)

    def follow(self, tokens: Tokens, tile: Tile, before: Any) -> Tensor:
        """q~ against the sums up to each token."""
        q, k = (self.features(name, x, tile, ()).mapped() for name, x in (("q", tokens.q), ("k", tokens.k)))
        above, below = causal_products(q, k, tokens.v, before)
        return (above / below.clamp(min=_LEAST)).to(tokens.q.dtype)
