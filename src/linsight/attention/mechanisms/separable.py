"""Separable self-attention: one score for each token makes one mean of the keys, which every value is multiplied by.

Mehta, Rastegari, "Separable Self-attention for Mobile Vision Transformers" (MobileViTv2, arXiv 2206.02680), as of timm.
With a projection of a token to a score s of one channel, k and v of C channels each,

    g = sum_n softmax_n(s_n) k_n,   o_n = relu(v_n) * g

without heads and without a scale. MobileViTv2 runs it apart for each of the four places in patches of 2x2 tokens: that
belongs to its block, which brings the places into the batch. Prefix tokens, of which the publication has none, are as
all others. timm's form with another sequence of keys reads one channel of the weights of v: there is none here.
"""

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import LogSumExp, Tile, accumulator

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens, merge_heads, split_heads


class ScoredMean(Round):
    """g, the mean of the keys under softmax of the scores."""

    def absorb(self, core: "Separable", tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """A log-sum-exp of one slot, for all channels."""
        if tokens.extra is None:
            raise LinsightError("the scores of separable attention are a projection: it needs projections='xkv'")
        return LogSumExp.absorb(tokens.extra[:, :, None], merge_heads(tokens.k)[:, :, None], tokens.keep)

    def finish(self, core: "Separable", state: LogSumExp, done: Done) -> Tensor:
        """g `(B, 1, H, D)`."""
        return split_heads(state.mean()[:, 0], core.num_heads)


@register(
    "separable",
    formula="o_n = relu(v_n) * sum_m softmax_m(s_m) k_m",
    latex=r"o_n = \mathrm{relu}(v_n) \odot \sum_m \mathrm{softmax}_m(s_m) k_m",
    family="pooling",
    also=("MobileViTv2",),
    complexity="O(N d)",
    paper=Paper("Separable Self-attention for Mobile Vision Transformers", "2206.02680", "TMLR 2023"),
)
class Separable(Core):
    """A mean of the keys, multiplied by rectified values; heads have no effect."""

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (ScoredMean(),)
    projections = "xkv"
    extra_dim = 1
    published = (Rename("qkv_proj.", "qkv.", ones=2), Rename("out_proj.", "proj.", ones=2))

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
        """relu(v) g."""
        return (tokens.v.relu().to(accumulator(tokens.v.dtype)) * done[0]).to(tokens.v.dtype)
