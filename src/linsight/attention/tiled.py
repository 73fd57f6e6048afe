"""A core over tiles in memory."""

import dataclasses

from torch import Tensor

from linsight.errors import CapabilityError
from linsight.ops import Tile

from .core import Core
from .registry import require
from .rounds import drive
from .tokens import Tokens


def run_rounds(core: Core, tokens: Tokens, cut: list[Tile]) -> Tensor:
    """Run the rounds of `core` over the tiles `cut`, which together cover the grid: equal to `core.forward`.

    Returns `(B, P + H*W, heads, E)`. No step sees more than one tile and the finished states.

    Raises:
        CapabilityError: the mechanism has no mergeable state.
    """
    require(core, "stream", "tiles")
    if core.causal:
        raise CapabilityError("the causal form depends on the order of tokens and has no tiles: pass causal=False")
    grid = cut[0].grid

    def seen(tile: Tile, halo: int) -> tuple[Tokens, Tile]:
        tile = dataclasses.replace(tile, halo=halo)
        return core.placed_tokens(tokens.each(tile.take), tile), tile

    done = drive(core, lambda now: (seen(tile, now.halo) for tile in cut))
    out: Tensor | None = None
    for tile in cut:
        part = core.read(*seen(tile, core.halo), done)
        if out is None:
            out = part.new_empty(part.shape[0], grid.tokens, *part.shape[2:])
        tile.put(out, part)
    assert out is not None
    return out
