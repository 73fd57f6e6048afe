"""ESSA: efficient spectral-spatial attention, whose features are the squares of centred queries and keys.

Zhang et al., "ESSAformer: Efficient Transformer for Hyperspectral Image Super-resolution", ICCV 2023, by its published
code. For each head, with f(x) = c^2 / (sum c^2 + 1e-7) over the channels and c = x - mean x,

    o_i = v_i + N^(-1/2) q^_i sum_j k^_j v_j^T,   q^ = f(q) / |f(q)|,   k^_jc = f(k)_jc / |f(k)_.c|

where the norm of a query is over its channels, that of a key channel over the N tokens; both are at least 1e-12.
Nothing is below the line. Published models have one head. Prefix tokens, of which the publication has none, are read
and absorbed as all others; N counts the tokens that are absorbed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linsight.ops import Tile, accumulator, apply_state, count_tokens, full_precision, mask_tokens, outer_sum

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_EPS, _LEAST = 1e-7, 1e-12  # of a sum of squares, and of a norm


class SquaredSums(NamedTuple):
    """kv: `(B, H, D, E)` sum f(k) v^T.  squares: `(B, H, D)` sum f(k)^2.  count: `(B,)` tokens absorbed."""

    kv: Tensor
    squares: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class KeySums(Round):
    """The product of keys and values, and the norms of key channels."""

    def absorb(self, core: "ESSA", tokens: Tokens, tile: Tile, done: Done) -> SquaredSums:
        """Sums over the tile's tokens."""
        k, v = (mask_tokens(x, tokens.keep) for x in (features(tokens.k), tokens.v.to(accumulator(tokens.v.dtype))))
        with full_precision(k):
            return SquaredSums(outer_sum(k, v), k.square().sum(dim=1), count_tokens(k, tokens.keep))

    def finish(self, core: "ESSA", state: SquaredSums, done: Done) -> Tensor:
        """N^(-1/2) sum k^ v^T, `(B, H, D, E)`."""
        scale = norm(state.squares) * state.count.clamp(min=1).sqrt()[:, None, None]
        return state.kv / scale[..., None]


@register(
    "essa",
    formula="o_i = v_i + N^(-1/2) q^_i sum_j k^_j v_j^T, q^ and k^ = squares of centred q and k, normed over channels "
    "and over tokens",
    latex=r"\begin{aligned} o_i &= v_i + N^{-1/2} \hat q_i \sum_j \hat k_j v_j^\top, \quad f(x) = "
    r"\frac{(x - \bar x)^2}{\sum_c (x - \bar x)_c^2 + 10^{-7}} \cr "
    r"\hat q_i &= \frac{f(q_i)}{\lVert f(q_i) \rVert}, \quad \hat k_{jc} = \frac{f(k_j)_c}{\sqrt{\sum_m "
    r"f(k_m)_c^2}} \end{aligned}",
    family="feature map",
    also=("ESSAformer",),
    complexity="O(N d^2)",
    paper=Paper("ESSAformer: Efficient Transformer for Hyperspectral Image Super-resolution", "", "ICCV 2023"),
)
class ESSA(Core):
    """Squared correlations of queries and keys, normed over channels and tokens, added to the values."""

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (KeySums(),)
    published = (Rename("lnqkv.", "qkv."), Rename("ln.", "proj."))

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

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The normed features of the queries against the state, and v."""
        q = features(tokens.q)
        with full_precision(q):
            q = q / norm(q.square().sum(dim=-1, keepdim=True))
            return (tokens.v.to(q.dtype) + apply_state(q, done[0])).to(tokens.q.dtype)


def features(x: Tensor) -> Tensor:
    """f of `x` `(B, N, H, D)`, in the accumulator's dtype."""
    x = x.to(accumulator(x.dtype))
    squares = (x - x.mean(dim=-1, keepdim=True)).square()
    return squares / (squares.sum(dim=-1, keepdim=True) + _EPS)


def norm(squares: Tensor) -> Tensor:
    """The root of sums of squares, at least 1e-12; finite in its gradient at 0, too."""
    return squares.clamp(min=_LEAST**2).sqrt()
