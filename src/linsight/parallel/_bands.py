"""A block run unchanged on the band of rows that a rank holds: convolutions through a halo, attention by one gather."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from linsight.attention import Core, Tokens, drive
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Tile

from ._ranks import Ranks


class Band(NamedTuple):
    """The rows of a grid that a rank works on: its own, and `reach` more on each side as far as the grid goes.

    bounds: where the own rows of each rank begin, and where those of the last one end.
    """

    grid: Grid
    bounds: tuple[int, ...]
    own: int
    reach: int

    def tile(self, halo: int = 0, more: int = 0) -> Tile:
        """The own rows, and `more` on each side as own ones."""
        return _tile(self.grid, self.bounds[self.own] - more, self.bounds[self.own + 1] + more, halo)

    @property
    def seen(self) -> Grid:
        """The grid that the block is told. Prefix tokens are where its first row is."""
        first, end = self.tile(self.reach).rows
        return Grid(end - first, self.grid.width, 0 if first else self.grid.prefix)

    @property
    def have(self) -> list[int]:
        """Where the tokens of each rank begin in the whole sequence; the prefix tokens are the first one's."""
        prefix, width = self.grid.prefix, self.grid.width
        return [0, *(prefix + bound * width for bound in self.bounds[1:])]

    @property
    def want(self) -> list[tuple[int, int]]:
        """Where the tokens that each rank works on begin and end in the whole sequence."""
        prefix, width = self.grid.prefix, self.grid.width
        spans = (self._replace(own=r).tile(self.reach).rows for r in range(len(self.bounds) - 1))
        return [(prefix + first * width if first else 0, prefix + end * width) for first, end in spans]

    def take(self, x: Tensor, tile: Tile) -> Tensor:
        """The tokens of `tile`, its halo included, out of `x` `(B, n, ...)`, those of all that is seen."""
        start, end = self._span(tile)
        return x[:, start:end]

    def outer(self, x: Tensor, tile: Tile) -> Tensor:
        """`x` `(B, n, ...)`, tokens of `tile` without halo, among zeros."""
        start, end = self._span(dataclasses.replace(tile, halo=0))
        return F.pad(x, (*[0, 0] * (x.ndim - 2), start, self.seen.tokens - end))

    def _span(self, tile: Tile) -> tuple[int, int]:
        seen, (first, end), above = self.seen, tile.rows, self.tile(self.reach).rows[0]
        start = 0 if tile.prefix else seen.prefix + (first - above) * seen.width
        return start, seen.prefix + (end - above) * seen.width


def _tile(grid: Grid, first: int, end: int, halo: int) -> Tile:
    first, end = max(0, first), min(grid.height, end)
    return Tile(grid, first, 0, end - first, grid.width, halo)


class Bands:
    """Runs blocks whose cores it has taken over: each makes its states of the rank's own rows, and folds all ranks'."""

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        self._band: Band | None = None  # the rows of the block that runs
        cores = [part for part in module.modules() if isinstance(part, Core)]
        if any("forward" in vars(part) for part in (module, *cores)):
            raise LinsightError(f"this {type(module).__name__} is split already")
        for core in cores:
            core.__dict__["forward"] = functools.partial(self._meet, core)
            core.cut_up = True

    def run(
        self, block: Callable[..., Tensor], x: Tensor, band: Band, beside: Mapping[str, Tensor], again: bool = False
    ) -> Tensor:
        """The rank's own tokens `(B, n, C)`, and those `beside` them by name, to the same after `block`.

        `again`: what is needed of the block in the backward pass is computed there once more.
        """
        given = [self.ranks.exchange(t, 1, band.have, band.want) for t in (x, *beside.values())]

        def seen(x: Tensor, *more: Tensor) -> Tensor:
            with self._on(band):
                return block(x, band.seen, **dict(zip(beside, more, strict=True)))

        out = checkpoint(seen, *given, use_reentrant=False) if again else seen(*given)
        return band.take(out, band.tile())

    @contextmanager
    def _on(self, band: Band) -> Iterator[None]:
        before, self._band = self._band, band
        try:
            yield
        finally:
            self._band = before

    def _meet(self, core: Core, tokens: Tokens, layout: Any, **more: Any) -> Tensor:
        """Stand in the place of `core.forward`: make the states of the rank's rows, fold all ranks', read."""
        band, name = self._band, type(core).__name__
        if band is None or tokens.q.shape[1] != band.seen.tokens:
            raise LinsightError(f"this '{name}' is split over ranks: call what was given to split(), on bands of rows")
        if any(value is not None for value in (tokens.keep, *more.values())):
            raise CapabilityError(f"'{name}' is asked for more than its tokens here: it does not split over ranks")

        def part(tile: Tile) -> tuple[Tokens, Tile]:
            return core.placed_tokens(tokens.each(lambda t: band.take(t, tile)), tile), tile

        done = drive(core, lambda now: [part(band.tile(now.halo))], fold=self.ranks.fold)
        # Outputs that later convolutions see are read too; beyond their reach is zero.
        tile = band.tile(core.halo, band.reach - core.halo)
        return band.outer(self.ranks.tied(core.read(*part(tile), done), done), tile)
