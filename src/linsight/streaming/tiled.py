"""A block run unchanged on one tile at a time: convolutions through a halo, attention through merged states."""

import copy
import dataclasses
import functools
from typing import Any

from torch import Tensor, nn

from linsight.attention import Attention, Block, Core, Layer, Progress, Tokens, require
from linsight.errors import CapabilityError
from linsight.ops import Grid, Tile


class _Absorbed(Exception):  # no error: it ends a block's run at the core that had to absorb
    """Raised where a core has taken what it needs of a tile."""


class TiledBlock:
    """A block, for tiles of one grid. All tiles pass `rounds + 1` times through `run`, each pass ended by `end_pass`.

    A tile arrives with a halo of `reach` tokens, so that what zero padding at its edges spoils is cut away; only at
    the rim of the image are zeros what the whole block would see. At a core the run stops, until the core has the
    states of all its rounds.

    Raises:
        CapabilityError: a mechanism in the block has no states that merge; the message names those that have.
    """

    def __init__(self, block: nn.Module) -> None:
        check_streams(block)
        self.reach = reach(block)
        cores = [part for part in block.modules() if isinstance(part, Core)]
        self.passes = sum(len(core.rounds) for core in cores) + 1
        self._block = self._shadow(block)
        self._progress = {core: Progress(core) for core in cores}
        self._active: Progress | None = None  # how far the core is that absorbs in this pass

    def run(self, x: Tensor, tile: Tile) -> Tensor | None:
        """The tokens of `tile`, which has a halo of `reach`, to its own after the block; None in a pass that absorbs.

        `x` `(1, P + h*w, C)` has the prefix tokens in front where the tile with its halo begins at the origin.
        """
        self._tile = tile
        try:
            out = self._block(x, self._seen)
        except _Absorbed:
            return None
        return self._own(tile, 0).inner_of(out)

    def end_pass(self) -> bool:
        """To be called after all tiles; True where another pass is needed."""
        active, self._active = self._active, None
        if active is None:
            return False
        active.finish()
        return True

    def seen(self, tile: Tile) -> Grid:
        """The grid that the block is told: that of the tile with its halo."""
        (top, _), (left, _) = tile.rows, tile.columns
        return Grid(*tile.seen, tile.grid.prefix if top == left == 0 else 0)

    @property
    def _seen(self) -> Grid:
        return self.seen(self._tile)

    def _own(self, tile: Tile, halo: int) -> "_Crop":
        return _Crop(self._tile, self._seen, dataclasses.replace(tile, halo=halo))

    def _shadow(self, module: nn.Module) -> nn.Module:
        """A copy of the tree of modules, with the same parameters, whose cores are asked for their rounds."""
        twin = copy.copy(module)
        if isinstance(module, Core):
            twin.__dict__.update(forward=functools.partial(self._meet, module), cut_up=True)
        else:
            parts = {name: part and self._shadow(part) for name, part in module._modules.items()}
            twin.__dict__["_modules"] = parts
        return twin

    def _meet(self, core: Core, tokens: Tokens, layout: Any, **more: Any) -> Tensor:
        """Stand in the place of `core.forward`: absorb, or read once all rounds are done."""
        if any(value is not None for value in (tokens.keep, *more.values())):
            raise CapabilityError(f"'{type(core).__name__}' is asked for more than its tokens here: it does not stream")
        progress, tile = self._progress[core], self._tile
        if (now := progress.round) is not None:
            crop = self._own(tile, now.halo)
            progress.absorb(crop.tokens(core, tokens), crop.tile)
            self._active = progress
            raise _Absorbed
        # Outputs that later convolutions see are read too; beyond their reach is zero.
        crop = self._own(grown(tile, self.reach - core.halo), core.halo)
        return crop.outer(core.read(crop.tokens(core, tokens), crop.tile, progress.done))


@dataclasses.dataclass(frozen=True)
class _Crop:
    """Where `tile` lies in what is seen of its grid by the larger tile `around`, as a grid of its own, `seen`."""

    around: Tile
    seen: Grid
    tile: Tile

    @property
    def local(self) -> Tile:
        top, left = self.around.rows[0], self.around.columns[0]
        return dataclasses.replace(self.tile, grid=self.seen, top=self.tile.top - top, left=self.tile.left - left)

    def tokens(self, core: Core, tokens: Tokens) -> Tokens:
        """The tokens of `tile`, its halo included, as `core` is to see them."""
        return core.placed_tokens(tokens.each(self.local.take), self.tile)

    def inner_of(self, x: Tensor) -> Tensor:
        """The tokens of `tile` without halo."""
        return dataclasses.replace(self.local, halo=0).take(x)

    def outer(self, x: Tensor) -> Tensor:
        """`x` `(1, p + h*w, ...)`, those of `tile`, among zeros."""
        whole = x.new_zeros(x.shape[0], self.seen.tokens, *x.shape[2:])
        self.local.put(whole, x)
        return whole


def grown(tile: Tile, by: int) -> Tile:
    """`tile` with `by` tokens more on each side, as far as the grid reaches, as its own; without halo."""
    (top, bottom), (left, right) = (wide := dataclasses.replace(tile, halo=by)).rows, wide.columns
    return Tile(tile.grid, top, left, bottom - top, right - left)


def check_streams(block: nn.Module) -> None:
    """Raise a CapabilityError, naming who can, unless all mechanisms in `block` stream."""
    for part in block.modules():
        if isinstance(part, Core | Block) or (isinstance(part, Layer) and not isinstance(part, Attention)):
            require(part, "stream", "images in tiles")
        if isinstance(part, Core) and part.causal:
            raise CapabilityError("a causal form depends on the order of tokens and has no tiles: pass causal=False")
        if isinstance(part, Attention) and part.reduction is not None:
            raise CapabilityError("keys of a reduced grid do not stream: pass reduction=1")


def reach(block: nn.Module) -> int:
    """How many tokens a token sees beyond its place, other than through states."""
    if isinstance(block, Core):
        return max([block.halo, *(now.halo for now in block.rounds)])
    if isinstance(block, nn.Conv2d):
        if max(block.stride) > 1:
            raise CapabilityError("a block that makes its grid coarser does not stream: that is a step of its own")
        return max((k - 1) * d // 2 for k, d in zip(block.kernel_size, block.dilation, strict=True))
    return sum(map(reach, block.children()))
