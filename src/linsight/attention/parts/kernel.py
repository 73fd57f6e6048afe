"""Kernel attention: sums of phi(k) v^T and phi(k), read by phi(q). What linear mechanisms with a normaliser share.

    o_i = phi(q_i) S / (phi(q_i) . z + eps) + local_i,   S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j)

or the means in the place of both sums. Katharopoulos et al., "Transformers are RNNs", ICML 2020, equations 5 to 7.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

from torch import Tensor

from linsight.ops import (
    Features,
    LinearState,
    State,
    Tile,
    causal_linear_attention,
    count_tokens,
    linear_absorb,
    linear_read,
)

from ..core import Core
from ..rounds import Done, Round
from ..tokens import Tokens


class KernelSums(Round):
    """S and z of the keys of a `KernelCore`."""

    def absorb(self, core: "KernelCore", tokens: Tokens, tile: Tile, done: Done) -> State:
        """Sums over the tile's tokens."""
        return linear_absorb(core.placed_features("k", tokens.k, tile, done), tokens.v, tokens.keep)


class CountedSums(NamedTuple):
    """sums: over the keys.  count: `(B,)` tokens absorbed."""

    sums: LinearState
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class KernelMeans(KernelSums):
    """The means of phi(k) v^T and phi(k) over the tokens."""

    def absorb(self, core: "KernelCore", tokens: Tokens, tile: Tile, done: Done) -> CountedSums:
        """The sums, and the number of tokens."""
        return CountedSums(super().absorb(core, tokens, tile, done), count_tokens(tokens.v, tokens.keep))

    def finish(self, core: "KernelCore", state: CountedSums, done: Done) -> LinearState:
        """Divided by the number of tokens."""
        share = 1 / state.count.clamp(min=1)[:, None, None]
        return LinearState(state.sums.kv * share[..., None], state.sums.k * share)


class KernelCore(Core):
    """A core with a feature map. Mechanisms define `features`, and perhaps `local` and the round."""

    rounds: tuple[Round, ...] = (KernelSums(),)
    eps = 1e-6

    def features(self, name: Literal["q", "k"], x: Tensor, tile: Tile, done: Done) -> Features:
        """phi of queries or keys `x` `(B, n, H, D)` of `tile`, of which it has no halo."""
        raise NotImplementedError

    def placed_features(self, name: Literal["q", "k"], x: Tensor, tile: Tile, done: Done) -> Features:
        """`features`, turned by the places of `tile` where the rotary option turns them."""
        found = self.features(name, x, tile, done)
        return found._replace(turn=self.turn_of(found.x, tile)) if self.rotary and self.turns == "features" else found

    def local(self, tokens: Tokens, tile: Tile) -> Tensor | None:
        """A local term for the tile's own grid tokens: `(B, h*w, H, E)`, in the accumulator's dtype."""
        return None

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """phi(q) against the state, and the local term."""
        q = self.placed_features("q", tile.inner(tokens.q), dataclasses.replace(tile, halo=0), done)
        return linear_read(q, done[-1], self.eps, add=self.local(tokens, tile), dtype=tokens.v.dtype)

    def follow(self, tokens: Tokens, tile: Tile, before: Any) -> Tensor:
        """The causal form: sums over the tokens up to each one."""
        q, k = (self.placed_features(name, x, tile, ()) for name, x in (("q", tokens.q), ("k", tokens.k)))  # type: ignore[arg-type]
        return causal_linear_attention(q, k, tokens.v, keep=tokens.keep, eps=self.eps, before=before)
