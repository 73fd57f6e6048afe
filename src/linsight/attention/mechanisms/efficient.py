"""Efficient attention: o_i = softmax_c(q_i) E, E = sum_j softmax_j(k_jc) v_j^T.

Shen et al., "Efficient Attention: Attention with Linear Complexities", WACV 2021 (arXiv 1812.01243).
Queries are normalised over their channels, every key channel over the positions; the implied rows
then sum to 1, so there is neither a denominator nor a scale. The published layer adds its input to
its output; here the residual belongs to the block.
"""

import torch
from torch import Tensor

from linsight.ops import Grid, LogSumExp, State, Tile, accumulator, apply_state, full_precision

from ..core import Capabilities, Core, Rename, Tokens
from ..registry import Paper, register


@register(
    "efficient",
    formula="o_i = softmax_c(q_i) sum_j softmax_j(k_j) v_j^T",
    complexity="O(N d^2)",
    paper=Paper("Efficient Attention: Attention with Linear Complexities", "1812.01243", "WACV 2021"),
)
class Efficient(Core):
    """Softmax over channels for queries, over positions for keys."""

    capabilities = Capabilities(keep=True, sizes=True, cross=True, reduced=True, stream=True, prefix=True)
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

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> LogSumExp:
        """A log-sum-exp for each key channel."""
        return LogSumExp.absorb(tokens.k, tokens.v, tokens.keep)

    def finish(self, r: int, state: LogSumExp, grid: Grid) -> Tensor:
        """E `(B, H, D, E)`."""
        return state.mean()

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """softmax(q) E."""
        q = tokens.q.to(accumulator(tokens.q.dtype))
        with full_precision(q):
            return apply_state(q.softmax(dim=-1), done[0]).to(tokens.q.dtype)
