"""TransNormer's NormAttention: linear attention whose outputs are normed, in the place of a denominator.

Qin et al., "The Devil in Linear Transformer", EMNLP 2022 (arXiv 2210.10340), by its published code. With f = ELU
("elu", the first published model) or 1 + ELU ("elu+1", the second),

    o_i = r(f(q_i) sum_j f(k_j) v_j^T),   r(x) = x / (|x| C^(-1/2) + 1e-8)

without a scale, where r norms all heads of a token together and has no weight. The causal form sums over j <= i. The
relative positions of the published language models (LRPE) are not a part of it. Sums grow with N until the norm, so
they and the norm are made in float32 (float64 for float64). Its companion in early layers is `transnormer_diag`.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.ops import (
    FEATURE_MAPS,
    Features,
    Moments,
    Tile,
    accumulator,
    apply_state,
    causal_product,
    central_absorb,
    full_precision,
    mask_tokens,
)

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

PUBLISHED = (
    Rename("q_proj.", "q."),
    Rename("k_proj.", "k."),
    Rename("v_proj.", "v."),
    Rename("out_proj.", "proj."),
)


class Sums(Round):
    """The sum of f(k) v^T, as central moments: sum (k - K) (v - V)^T + n K V^T, with the means K and V."""

    def absorb(self, core: "TransNormer", tokens: Tokens, tile: Tile, done: Done) -> Moments:
        """Over the tile's tokens."""
        v = tokens.v.to(accumulator(tokens.v.dtype))
        k = core.mapped(tokens.k)
        return central_absorb(Features(k, turn=core.turn_of(k, tile)), v, tokens.keep)


@register(
    "transnormer",
    formula="o_i = r(f(q_i) sum_j f(k_j) v_j^T), r(x) = x / (|x| C^(-1/2) + eps), f = elu",
    latex=r"o_i = r \left( f(q_i) \textstyle\sum_j f(k_j) v_j^\top \right), \quad r(x) = \frac{x}{C^{-1/2} \lVert x "
    r"\rVert + 10^{-8}}, \quad f = \mathrm{elu}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("The Devil in Linear Transformer", "2210.10340", "EMNLP 2022"),
)
class TransNormer(Core):
    """Linear attention with a norm instead of a denominator.

    Args:
        feature_map: f.
        causal: token i sees tokens j <= i only; then there are no tiles.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True, causal=True)
    turns = "features"
    rounds = (Sums(),)
    published = PUBLISHED

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature_map: Literal["elu", "elu+1"] = "elu",
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.feature_map, self.causal = num_heads, feature_map, causal

    def mapped(self, x: Tensor) -> Tensor:
        """f, in the accumulator's dtype."""
        x = x.to(accumulator(x.dtype))
        if self.feature_map == "elu+1":
            return FEATURE_MAPS["elu+1"](x)
        above = F.relu(x)  # not torch's elu, the layout of whose gradient a graph does not foresee
        return above + torch.expm1(x - above)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """f(q) against the sum, normed."""
        q = self.by_place(self.mapped(tokens.q), tile)
        with full_precision(q):
            moments: Moments = done[0]
            mean = (q * (moments.k * moments.count[:, None, None])[:, None]).sum(dim=-1, keepdim=True)
            out = apply_state(q, moments.cross) + mean * moments.v[:, None]
            return normed(out).to(tokens.q.dtype)

    def follow(self, tokens: Tokens, tile: Tile, before: Any) -> Tensor:
        """The causal form: sums over the tokens up to each one."""
        q, k = (self.by_place(self.mapped(x), tile) for x in tokens[:2])
        v = mask_tokens(tokens.v, tokens.keep)
        if before is not None:
            before = before.cross + before.count[:, None, None, None] * before.k[..., None] * before.v[..., None, :]
        out = causal_product(q, mask_tokens(k, tokens.keep), v, before=before)
        return normed(out).to(tokens.q.dtype)


def normed(x: Tensor) -> Tensor:
    """r of `(B, N, H, E)`, all heads together. Of the numbers over the largest one, whose squares cannot overflow."""
    top = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    top = torch.where(top > 0, top, 1)
    x = x / top
    square = x.square().mean(dim=(-2, -1), keepdim=True)
    root = torch.where(square > 0, square, 1).sqrt()  # the gradient of a root at 0 is none
    return x / (torch.where(square > 0, root, 0) + 1e-8 / top)
