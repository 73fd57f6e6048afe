"""Efficient attention: o_i = softmax_c(q_i) E, E = sum_j softmax_j(k_jc) v_j^T.

Shen et al., "Efficient Attention: Attention with Linear Complexities", WACV 2021 (arXiv 1812.01243).
Queries are normalised over their channels, every key channel over the positions; the implied rows
then sum to 1, so there is neither a denominator nor a scale. The published layer adds its input to
its output; here the residual belongs to the block. Keys and values are as wide as the tokens; published
ones may be of other widths.
"""

import torch
from torch import Tensor

from linsight.ops import LogSumExp, Tile, accumulator, apply_state, full_precision

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens


class ChannelMeans(Round):
    """E: means of v under softmax over the tokens, one for each key channel."""

    def absorb(self, core: "Efficient", tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """A log-sum-exp for each key channel."""
        return LogSumExp.absorb(tokens.k, tokens.v, tokens.keep)

    def finish(self, core: "Efficient", state: LogSumExp, done: Done) -> Tensor:
        """E `(B, H, D, E)`."""
        return state.mean()


@register(
    "efficient",
    formula="o_i = softmax_c(q_i) sum_j softmax_j(k_j) v_j^T",
    latex=r"o_i = \mathrm{softmax}_c(q_i) E, \quad E_c = \sum_j \mathrm{softmax}_j(k_{jc}) v_j^\top",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("Efficient Attention: Attention with Linear Complexities", "1812.01243", "WACV 2021"),
)
class Efficient(Core):
    """Softmax over channels for queries, over positions for keys."""

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    rounds = (ChannelMeans(),)
    published = (
        Rename("queries.", "q.", ones=2),
        Rename("keys.", "k.", ones=2),
        Rename("values.", "v.", ones=2),
        Rename("reprojection.", "proj.", ones=2),
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

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """softmax(q) E."""
        q = tokens.q.to(accumulator(tokens.q.dtype))
        with full_precision(q):
            return apply_state(q.softmax(dim=-1), done[0]).to(tokens.q.dtype)
