"""Induced set attention (ISAB): m learned points attend to all tokens, and every token attends to what they found.

Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019
(arXiv 1810.00825), by its published code. With multihead attention blocks of width C and h heads,

    MAB(X, Y) = LN1(U + relu(W_o U)),   U = LN0(Q + softmax(C^(-1/2) Q K^T) V),   Q, K, V = W_q X, W_k Y, W_v Y
    ISAB(X) = MAB1(X, MAB0(I, X))

where softmax is of each head, but its scale is of the width of all heads, and what is added is the projected query, not
X. LN0 and LN1 are there with `norm`. So the layer has a feed-forward layer and residual connections inside it; a host
puts its own around them. Here the projections of the layer are W_q of MAB1 and W_k, W_v of MAB0, as these are what is
made of tokens, and `proj` is W_o of MAB1.

`PMA` is its pooling: PMA(X) = MAB(S, X) of k learned seeds. `SAB`, SAB(X) = MAB(X, X), is what ISAB stands for, of cost
O(N^2). Both are modules of tokens, not mechanisms. All keep the width of the tokens; published ones may change it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    LogSumExp,
    Tile,
    accumulator,
    full_precision,
    gather_pooled,
    gather_state,
    mask_tokens,
    read_pooled,
)

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..layer import Attention
from ..parts.pooled import Gather
from ..parts.wide import WideLayerNorm, WideLinear
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens, merge_heads, split_heads

NAMES = ("fc_k", "fc_v")  # of the linear maps of keys and values


class MAB(nn.Module):
    """A multihead attention block without the linear maps that are made of tokens, which are a layer's.

    Args:
        dim: C.
        linears: the names of those that it has, of "fc_q", "fc_k", "fc_v" and "fc_o".
        norm: with LN0 and LN1.
    """

    def __init__(self, dim: int, *linears: str, norm: bool, **factory: Any) -> None:
        super().__init__()
        for name in linears:
            self.add_module(name, WideLinear(dim, dim, **factory))
        self.ln0, self.ln1 = (WideLayerNorm(dim, **factory) if norm else nn.Identity() for _ in range(2))

    def conclude(self, u: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """LN1(U + relu(W_o U)) of U before LN0, `(B, n, C)`."""
        u = self.ln0(u)
        return self.ln1(u + F.relu(linear(u)))


class Asking(MAB):
    """A block whose queries are learned points."""

    fc_q: WideLinear
    fc_o: WideLinear

    def queries(self, points: Tensor, dtype: torch.dtype) -> Tensor:
        """Q `(1, n, C)` of points `(1, n, C)`."""
        return self.fc_q(points.to(dtype))

    def answer(self, queries: Tensor, mean: Tensor) -> Tensor:
        """The output `(B, n, C)` of means of V `(B, H, n, E)`."""
        return self.conclude(queries + merge_heads(mean.transpose(1, 2)), self.fc_o)


class Found(NamedTuple):
    """K `(B, m, H, D)` and V `(B, H, m, E)` of what the points found."""

    keys: Tensor
    values: Tensor


class Induce(Gather):
    """MAB0(I, X), and keys and values of it."""

    def absorb(self, core: "SetTransformer", tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """Sums of the tile's keys, relative to their largest score."""
        return gather_state(core.asking(tokens.k), tokens.k, tokens.v, None, tokens.keep)

    def at_once(self, core: "SetTransformer", tokens: Tokens, tile: Tile, done: Done) -> Found:
        """By scaled dot-product attention."""
        return self.values(core, gather_pooled(core.asking(tokens.k), tokens.k, tokens.v, None, tokens.keep), done)

    def values(self, core: "SetTransformer", mean: Tensor, done: Done) -> Found:
        """W_k H and W_v H of MAB1, of H = MAB0(I, X)."""
        with full_precision(mean):
            found = core.mab0.answer(core.mab0.queries(core.I, mean.dtype), mean)
            keys, values = (split_heads(core.mab1.get_submodule(name)(found), core.num_heads) for name in NAMES)
            return Found(keys, values.transpose(1, 2))


class InducedAttention(Attention):
    """A layer that ends as MAB1 does."""

    core: "SetTransformer"

    def conclude(self, out: Tensor, x: Tensor) -> Tensor:
        """MAB1 from its U on; `proj` is W_o."""
        return self.core.mab1.conclude(out, lambda u: self.proj_drop(self.proj(u)))


@register(
    "set_transformer",
    formula="ISAB(X) = MAB(X, MAB(I, X)), MAB(X, Y) = U + relu(W U), U = Q + softmax(C^(-1/2) Q K^T) V, I learned",
    latex=r"\begin{aligned} \mathrm{ISAB}(X) &= \mathrm{MAB}(X, \mathrm{MAB}(I, X)), \quad I \text{ learned} \cr "
    r"\mathrm{MAB}(X, Y) &= U + \mathrm{relu}(W_o U), \quad U = Q + \mathrm{softmax}(C^{-1/2} Q K^\top) V "
    r"\end{aligned}",
    family="low rank",
    also=("ISAB",),
    complexity="O(N m d)",
    paper=Paper(
        "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks",
        "1810.00825",
        "ICML 2019",
    ),
)
class SetTransformer(Core):
    """Attention through learned points, in two whole blocks of attention.

    Args:
        points: m.
        norm: LayerNorms inside both blocks.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    rounds = (Induce(),)
    projections = "q_k_v"
    reduced_projections = "q_k_v"
    layer = InducedAttention
    published = (
        Rename("I", "core.I"),
        Rename("mab0.", "core.mab0."),
        Rename("mab1.", "core.mab1."),
        Rename("mab0.fc_k.", "k."),
        Rename("mab0.fc_v.", "v."),
        Rename("mab1.fc_q.", "q."),
        Rename("mab1.fc_o.", "proj."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        points: int = 32,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if points < 1:
            raise LinsightError(f"points={points} of 'set_transformer' must be 1 or more; published are 16 to 32")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = num_heads**-0.5  # of queries: products have D^(-1/2) where they are made
        self.I = nn.Parameter(torch.empty(1, points, dim, **factory))
        nn.init.xavier_uniform_(self.I)
        self.mab0 = Asking(dim, "fc_q", "fc_o", norm=norm, **factory)
        self.mab1 = MAB(dim, *NAMES, norm=norm, **factory)

    def asking(self, like: Tensor) -> Tensor:
        """Q of MAB0 `(B, m, H, D)`, scaled, for the batch of `like`."""
        with full_precision(like):
            queries = self.mab0.queries(self.I, accumulator(like.dtype)) * self.scale
        return split_heads(queries, self.num_heads).expand(like.shape[0], -1, -1, -1)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The U of MAB1 before LN0."""
        q = tokens.q.to(accumulator(tokens.q.dtype))
        return (q + read_pooled(q * self.scale, done[0].keys, done[0].values, None)).to(tokens.q.dtype)


class Block(Asking):
    """A whole block, with the linear maps of its tokens."""

    def __init__(self, dim: int, num_heads: int, *, norm: bool, **factory: Any) -> None:
        super().__init__(dim, "fc_q", *NAMES, "fc_o", norm=norm, **factory)
        self.num_heads = num_heads

    def forward(self, points: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
        """MAB(points, x), `(B, n, C)`, of points `(1, n, C)` or `(B, n, C)`."""
        x = mask_tokens(x, keep)  # before the linear maps: 0 * NaN in a gradient is NaN
        k, v = (split_heads(self.get_submodule(name)(x), self.num_heads) for name in NAMES)
        with full_precision(x):
            queries = self.queries(points, accumulator(x.dtype))
            asking = split_heads(queries * self.num_heads**-0.5, self.num_heads).expand(x.shape[0], -1, -1, -1)
            return self.answer(queries, gather_pooled(asking, k, v, None, keep)).to(x.dtype)


class SAB(nn.Module):
    """Self-attention in a whole block: `(B, N, C)` tokens to as many, each of which has attended to all.

    Args:
        dim, num_heads: C and h.
        norm: with LayerNorms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mab = Block(dim, num_heads, norm=norm, device=device, dtype=dtype)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The tokens that attend to all but those that `keep` `(B, N)` drops, which come out as zeros."""
        return mask_tokens(self.mab(mask_tokens(x, keep), x, keep), keep)


class PMA(nn.Module):
    """Pooling by multihead attention: `(B, N, C)` tokens to what `seeds` learned seeds find in them, `(B, seeds, C)`.

    Args:
        dim, num_heads: C and h.
        seeds: k.
        norm: with LayerNorms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        seeds: int = 1,
        *,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.S = nn.Parameter(torch.empty(1, seeds, dim, device=device, dtype=dtype))
        nn.init.xavier_uniform_(self.S)
        self.mab = Block(dim, num_heads, norm=norm, device=device, dtype=dtype)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The pooled tokens of `x`, without those that `keep` `(B, N)` drops."""
        return self.mab(self.S, x, keep)
