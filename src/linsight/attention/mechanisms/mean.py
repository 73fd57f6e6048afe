"""Mean attention: o_i = (1/N) sum_j v_j. Every token receives the mean value; queries and keys are not used.

The control of a comparison: what it reaches, the rest of a network reaches without attention. As a token mixer it is
the pooling of Weihao Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022, over the whole grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linsight.ops import Tile, accumulator, count_tokens, mask_tokens

from ..capabilities import Capabilities, Structure
from ..core import Core
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens


class Sums(NamedTuple):
    """total: `(B, H, E)` sum v.  tokens: `(B,)` how many were absorbed."""

    total: Tensor
    tokens: Tensor


class MeanValue(Round):
    """The mean of the values."""

    def absorb(self, core: "Mean", tokens: Tokens, tile: Tile, done: Done) -> Sums:
        """The sum of the tile's values, and their number."""
        v = mask_tokens(tokens.v, tokens.keep)
        return Sums(v.sum(dim=1, dtype=accumulator(v.dtype)), count_tokens(v, tokens.keep))

    def finish(self, core: "Mean", state: Sums, done: Done) -> Tensor:
        """The mean value `(B, H, E)`."""
        return state.total / state.tokens.clamp(min=1)[:, None, None]


@register(
    "mean",
    formula="o_i = (1/N) sum_j v_j",
    latex=r"o_i = \frac{1}{N} \sum_j v_j",
    family="pooling",
    complexity="O(N d)",
    paper=Paper("MetaFormer Is Actually What You Need for Vision", "2111.11418", "CVPR 2022"),
)
class Mean(Core):
    """The mean value, for every token: the control that other mechanisms are to beat."""

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (MeanValue(),)
    projections = "v"

    def __init__(
        self, dim: int, num_heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """One output for every query, in the dtype of the queries."""
        mean: Tensor = done[0]
        q = tile.inner(tokens.q)
        return mean[:, None].expand(-1, q.shape[1], -1, -1).to(q.dtype)
