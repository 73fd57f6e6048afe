"""Rounds through a few pooled tokens, as of agent attention and its kin: pool the queries, then gather from the keys.

Pooled tokens are `(B, n, H, D)`, what they gather `(B, H, n, E)`; see `linsight.ops.pooled`.
"""

from typing import Any, Literal

from torch import Tensor

from linsight.ops import LogSumExp, Tile, gather_pooled, gather_state, pool_tokens

from ..rounds import Done, Round
from ..tokens import Tokens


class Pool(Round):
    """Adaptive averages of the queries' map over a grid of `size` cells."""

    of: Literal["keys", "queries"] = "queries"
    placed = True

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def absorb(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The tile's share of the cells `(B, n, H, D)`."""
        return pool_tokens(tokens.q, tile, self.size)


class Gather(Round):
    """Means of v under softmax over the keys, for each of the pooled tokens of the round before."""

    def bias(self, core: Any, tile: Tile) -> Tensor | None:
        """A bias on the scores of the tile's keys, `(B or 1, H, n, N)`."""
        return None

    def values(self, core: Any, mean: Tensor, done: Done) -> Any:
        """The values that are read, of the means `(B, H, n, E)` and the rounds before."""
        return mean

    def absorb(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """Sums of the tile's keys, relative to their largest score."""
        return gather_state(done[-1], tokens.k, tokens.v, self.bias(core, tile), tokens.keep)

    def finish(self, core: Any, state: LogSumExp, done: Done) -> Any:
        """The means, as they are read."""
        return self.values(core, state.mean(), done)

    def at_once(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> Any:
        """By scaled dot-product attention."""
        mean = gather_pooled(done[-1], tokens.k, tokens.v, self.bias(core, tile), tokens.keep)
        return self.values(core, mean, done)
