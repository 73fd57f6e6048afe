"""Rounds: how a mechanism sums tokens up into states that merge, and the one driver that runs them.

    absorb   tokens of a tile, what is done -> a state, whose size does not depend on N
    merge    two states                     -> one (associative, see `linsight.ops.merge`)
    finish   the merged state, once         -> what readers need: divided, clipped, activated
    read     tokens of a tile, what is done -> outputs (by the core)

The whole image, tiles in memory, tiles of a stream and bands of rows over ranks differ in what absorbs when, and in
how states come together. The order of the rounds is here alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from linsight.ops import Layout, State, Tile, merge, plain_is_asked

from .tokens import Tokens

Done: TypeAlias = tuple[Any, ...]  # finished states of the rounds so far


class Round:
    """One pass over all tokens. It holds no tensors: parameters are those of the core that it is called with.

    So a round may be shared by cores, and follows them into copies, replicas and functional calls.

    of: whose grid it absorbs, that of k and v or that of q and x.
    halo: by how many further tokens on each side `absorb` sees a tile, as far as the grid reaches.
    placed: where tokens lie matters to it, as to one that pools them over cells.
    """

    of: Literal["keys", "queries"] = "keys"
    placed: bool = False

    def __init__(self, halo: int = 0) -> None:
        self.halo = halo

    def absorb(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> State:
        """The state of the tokens of one tile, given the finished states of the rounds before it."""
        raise NotImplementedError

    def finish(self, core: Any, state: Any, done: Done) -> Any:
        """The state of all tokens as readers need it: divided, clipped, activated. Once an image."""
        return state

    def at_once(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> Any:
        """Its finished state where one tile is all there is: for rounds that a library kernel then serves."""
        return self.finish(core, self.absorb(core, tokens, tile, done), done)


class Progress:
    """How far a core has come: finished states of the rounds behind it, and the merged state of the one it is in."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.done: Done = ()
        self._state: State = None

    @property
    def round(self) -> Round | None:
        """The round that absorbs now; None when all are done, and the core can read."""
        rounds: tuple[Round, ...] = self.core.rounds
        return rounds[len(self.done)] if len(self.done) < len(rounds) else None

    def absorb(self, tokens: Tokens, tile: Tile) -> None:
        """Take the tokens of a tile, which has the halo of the round."""
        assert self.round is not None
        part = self.round.absorb(self.core, tokens, tile, self.done)
        self._state = part if self._state is None else merge(self._state, part)

    def finish(self, fold: Callable[[State], State] | None = None) -> None:
        """End the round; `fold` first brings in the states of others, as other ranks."""
        assert self.round is not None
        state = self._state if fold is None else fold(self._state)
        self.done += (self.round.finish(self.core, state, self.done),)
        self._state = None

    def at_once(self, tokens: Tokens, tile: Tile) -> None:
        """Begin and end the round with all tokens."""
        assert self.round is not None
        self.done += (self.round.at_once(self.core, tokens, tile, self.done),)


Parts: TypeAlias = Callable[[Round], Iterable[tuple[Tokens, Tile]]]


def drive(core: Any, parts: Parts, *, fold: Callable[[State], State] | None = None, whole: bool = False) -> Done:
    """Finished states of all rounds of `core`.

    parts: for a round, tokens and their tiles, which have its halo and together are all that is absorbed here.
    fold: the state of all, of the one that was absorbed here.
    whole: each round has one tile, which is all there is, and takes it at once.
    """
    progress = Progress(core)
    while (now := progress.round) is not None:
        for tokens, tile in parts(now):
            if whole:
                progress.at_once(tokens, tile)
            else:
                progress.absorb(tokens, tile)
        if not whole:
            progress.finish(fold)
    return progress.done


def dense(core: Any, tokens: Tokens, layout: Layout, context_layout: Layout | None = None) -> Tensor:
    """Outputs `(B, M, H, E)` where all tokens are at hand: the rounds over one tile, then one reading."""
    source = context_layout or layout
    queries, keys = Tile.whole(layout.grid, layout.sizes), Tile.whole(source.grid, source.sizes)

    # `keep` is of the keys; of queries that lie elsewhere, those beyond an image's own size are not there.
    asking = tokens if context_layout is None else tokens._replace(keep=layout.keep(tokens.q.device))

    def parts(now: Round) -> list[tuple[Tokens, Tile]]:
        return [(asking, queries) if now.of == "queries" else (tokens, keys)]

    done = drive(core, parts, whole=not plain_is_asked())
    if context_layout is None:
        return core.read(tokens, queries, done)
    return core.read(core.lift(tokens, keys, queries), queries, done).to(tokens.v.dtype)


def scan(core: Any, tokens: Tokens, cut: Sequence[Tile]) -> Tensor:
    """Outputs `(B, N, H, E)` where a token sees itself and what is before it, of a core with one round of sums.

    Tiles are read in order: `core.follow` sees the merged state of those before a tile, and the tile itself.

    cut: tiles of whole rows, from the top, that cover the grid.
    """
    (now,) = core.rounds
    before: State = None
    outs = []
    for tile in cut:
        part = tokens.each(tile.take)
        outs.append(core.follow(part, tile, before))
        if tile is not cut[-1]:
            state = now.absorb(core, part, tile, ())
            before = state if before is None else merge(before, state)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
