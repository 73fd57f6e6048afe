"""Efficient additive attention: one global query, which every key is multiplied by; no values, no products of tokens.

Shaker et al., "SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications",
ICCV 2023 (arXiv 2303.15446), by its published code since the repair of the weights, and timm's. Over all C channels,
without heads, with q^ = q / |q|, k^ = k / |k| and a learnable vector w,

    a_n = C^(-1/2) q^_n . w,   g = sum_n a_n q^_n / |a|,   o_n = W (g * k^_n) + b + q^_n

where |a| is over the N tokens; norms are at least 1e-12. The first release had a softmax over an axis of one number in
the place of a / |a|, and other libraries still have: their weights are those of another function. g grows with sqrt(N),
as published. Prefix tokens, of which the publication has none, are as all others. Everything is computed in float32
(float64 for float64), where 1e-12 is a number.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import Tile, accumulator, full_precision, mask_tokens, outer_sum

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..parts.wide import WideLinear
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens, merge_heads, split_heads

_LEAST = 1e-12  # of a norm


class QuerySums(NamedTuple):
    """total: `(B, C)` sum a q^.  squares: `(B, 1)` sum a^2."""

    total: Tensor
    squares: Tensor


class AdditiveQuery(Round):
    """g, the global query."""

    of: Literal["keys", "queries"] = "queries"

    def absorb(self, core: "Additive", tokens: Tokens, tile: Tile, done: Done) -> QuerySums:
        """Sums over the tile's queries."""
        q = mask_tokens(normed(tokens.q), tokens.keep)
        with full_precision(q):
            a = q @ core.w_g.to(q.dtype) * q.shape[-1] ** -0.5  # (B, N, 1)
            return QuerySums(outer_sum(a[:, :, None], q[:, :, None])[:, 0, 0], a.square().sum(dim=1))

    def finish(self, core: "Additive", state: QuerySums, done: Done) -> Tensor:
        """g `(B, 1, C)`."""
        return (state.total / state.squares.clamp(min=_LEAST**2).sqrt())[:, None]


@register(
    "additive",
    formula="o_n = W (g * k^_n) + b + q^_n, g = sum_n a_n q^_n / |a|, a_n = C^(-1/2) q^_n . w, q^ = q / |q|",
    latex=r"o_n = W (g \odot \hat k_n) + b + \hat q_n, \quad g = \sum_n \frac{a_n}{\lVert a \rVert} \hat q_n, \quad "
    r"a_n = C^{-1/2} \hat q_n \cdot w",
    family="pooling",
    also=("SwiftFormer",),
    complexity="O(N d)",
    paper=Paper("SwiftFormer: Efficient Additive Attention", "2303.15446", "ICCV 2023"),
)
class Additive(Core):
    """A global query, multiplied by normed keys; heads have no effect."""

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (AdditiveQuery(),)
    projections = "q_k"
    published = (
        Rename("to_query.", "q."),
        Rename("to_key.", "k."),
        Rename("w_g", "core.w_g"),
        Rename("Proj.", "core.proj."),
        Rename("final.", "proj."),
    )

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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w_g = nn.Parameter(torch.empty(dim, 1, **factory))
        nn.init.normal_(self.w_g)
        self.proj = WideLinear(dim, dim, **factory)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The projection of g times the normed keys, and the normed queries."""
        q, k, g = normed(tokens.q), normed(tokens.k), done[0]
        with full_precision(q):
            out = self.proj(g * k) + q
        return split_heads(out, self.num_heads).to(tokens.q.dtype)


def normed(x: Tensor) -> Tensor:
    """`x` `(B, N, H, D)` over its norm over all channels, `(B, N, C)`, in the accumulator's dtype."""
    return F.normalize(merge_heads(x).to(accumulator(x.dtype)), dim=-1, eps=_LEAST)
