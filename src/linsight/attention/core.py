"""The contract of a mechanism: a Core, its tokens and its capabilities."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from linsight.errors import CapabilityError
from linsight.ops import Grid, Layout, State, Tile, merge


class Tokens(NamedTuple):
    """What a mechanism sees. q `(B, M, H, D)`; k `(B, N, H, D)`; v `(B, N, H, E)`, head-major channels.

    x: `(B, M, C)` what the queries were projected from; for a core that is `conditioned`, what the host gives.
    keep: `(B, N)` bool, False where a key is not to be seen; None when all are.
    extra: `(B, N, core.extra_dim)`, further projected channels, for a core that asks for them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor | None = None
    keep: Tensor | None = None
    extra: Tensor | None = None


class Linear(NamedTuple):
    """weight: `(out, in)`.  bias: `(out,)`, or None."""

    weight: Tensor
    bias: Tensor | None

    def split(self, width: int) -> "list[Linear]":
        """Those that yield `width` channels each, in order."""
        weights = self.weight.split(width)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(width)
        return list(map(Linear, weights, biases))


class Capabilities(NamedTuple):
    """What the formula of a mechanism allows. What is False raises an error that names who can.

    keep: drop tokens.  sizes: padded batches.  packed: packed batches.  cross: keys from another
    sequence.  reduced: keys of the same image on a coarser grid.  score_bias: an additive bias on the
    scores.  stream: rounds of mergeable states, so tiles, ranks and images of any size.  prefix: class
    and register tokens.  causal: a causal form.
    """

    keep: bool = False
    sizes: bool = False
    packed: bool = False
    cross: bool = False
    reduced: bool = False
    score_bias: bool = False
    stream: bool = False
    prefix: bool = False
    causal: bool = False


class Rename(NamedTuple):
    """One rule of a key map: keys that start with `published` start with `ours` here.

    ones: trailing axes of size 1 that weights have there, as those of 1x1 convolutions.
    """

    published: str
    ours: str
    ones: int = 0


class Core(nn.Module):
    """A mechanism without projections: tokens in, tokens out.

    A streaming mechanism defines `absorb`, `finish` and `read`; the dense form, tiles and ranks
    follow from them. One without a mergeable state sets `rounds = 0` and defines `forward`.

    The constructor takes `(dim, num_heads, *, ..., device=None, dtype=None)`; its other keyword
    arguments are the mechanism's options. `dim` is the width of the values, heads merged. One with
    parameters that lie on a grid, as a position table, also takes `grid`, the height and width that
    its keys are built for; it works on any other, and `set_grid` moves it there for good. `query_grid` is that
    of its queries, which a reduction makes another one. One that differs from block to block also takes `index`,
    its block's place in the model, from 0.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()
    rounds: int = 1
    halos: tuple[int, ...] = (0, 0)  # of each round's absorb, then of read
    of_queries: ClassVar[tuple[int, ...]] = ()  # rounds that absorb the grid of q and x; the others, that of k and v
    projections: ClassVar[str] = "qkv"  # the layout of the layer around it, see `_layer.py`
    qkv_bias: ClassVar[bool] = True  # False: projected without one, whatever the host has
    conditioned: ClassVar[bool] = False  # whether x is what the host conditions layers on, where it does
    layer: ClassVar[type[nn.Module] | None] = None  # the `Attention` around it, where the usual one does not do
    extra_dim: int = 0  # width of `tokens.extra`
    out_dim: int | None = None  # width of the outputs, heads merged, where it is not `dim`
    published: ClassVar[tuple[Rename, ...]] = ()  # key map of the layer, beyond qkv and proj

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> State:
        """The state of round `r` of the tokens of one tile, given the finished states before it."""
        raise CapabilityError(f"{type(self).__name__} has no mergeable state: it cannot be streamed or split")

    def merge(self, r: int, a: State, b: State) -> State:
        """The state of two disjoint sets of tokens. Associative."""
        return merge(a, b)

    def finish(self, r: int, state: State, grid: Grid) -> State:
        """What readers need of the state of all tokens: divided, clipped, activated. Once a round."""
        return state

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """Outputs `(B, n, H, E)` of the tile's own tokens."""
        raise CapabilityError(f"{type(self).__name__} has no mergeable state: it cannot be streamed or split")

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """Outputs `(B, M, H, E)`: the rounds over the whole grid.

        `layout` is that of q and x; `context_layout` that of k, v and keep where it differs.
        """
        done: tuple[State, ...] = ()
        source = context_layout or layout
        queries, keys = Tile.whole(layout.grid, layout.sizes), Tile.whole(source.grid, source.sizes)
        for r in range(self.rounds):
            tile = queries if r in self.of_queries else keys
            done += (self.finish(r, self.absorb(r, tokens, tile, done), tile.grid),)
        return self.read(tokens, queries, done)

    def folds(self, x: Tensor) -> bool:
        """Whether `folded` is the quicker way for a layer's input `(B, N, C)`."""
        return False

    def folded(self, x: Tensor, linears: list[Linear], layout: Layout, cond: Tensor) -> Tensor:
        """The layer around, all of it: `(B, N, C)` to `(B, N, C)`.

        For mechanisms that the layer's `linears` can be made a part of: those that yield q, k and v, in this order, and
        that of its output. Asked only where nothing is recorded, nobody looks, all tokens are kept and the batch is
        neither padded nor packed. `cond` is what a conditioned core is given as x.
        """
        raise NotImplementedError

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser should not decay, beyond 1-d ones."""
        return set()

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        heads: Any = getattr(self, "num_heads", None)
        return "" if heads is None else f"num_heads={heads}"


def run_rounds(core: Core, tokens: Tokens, cut: list[Tile]) -> Tensor:
    """The rounds of `core` over the tiles `cut`, which together cover the grid: equal to `core.forward`.

    Returns `(B, P + H*W, heads, E)`. No step sees more than one tile and the finished states.

    Raises:
        CapabilityError: the mechanism has no mergeable state.
    """
    from .registry import require  # which imports this module

    require(type(core), "stream", "tiles")
    grid = cut[0].grid

    def seen(tile: Tile, halo: int) -> tuple[Tokens, Tile]:
        tile = dataclasses.replace(tile, halo=halo)
        return Tokens(*(None if t is None else tile.take(t) for t in tokens)), tile  # type: ignore[arg-type]

    done: tuple[State, ...] = ()
    for r in range(core.rounds):
        state: State = None
        for tile in cut:
            part = core.absorb(r, *seen(tile, core.halos[r]), done)
            state = part if state is None else core.merge(r, state, part)
        done += (core.finish(r, state, grid),)
    out: Tensor | None = None
    for tile in cut:
        part = core.read(*seen(tile, core.halos[-1]), done)
        if out is None:
            out = part.new_empty(part.shape[0], grid.tokens, *part.shape[2:])
        out[:, : tile.prefix] = part[:, : tile.prefix]
        canvas = out[:, grid.prefix :].unflatten(1, (grid.height, grid.width))
        rows, columns = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
        canvas[:, rows, columns] = part[:, tile.prefix :].unflatten(1, (tile.height, tile.width))
    assert out is not None
    return out


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(B, N, C)` -> `(B, N, H, C / H)`, head-major channels."""
    return x.view(*x.shape[:-1], num_heads, -1)


def merge_heads(x: Tensor) -> Tensor:
    """`(B, N, H, D)` -> `(B, N, H * D)`."""
    return x.flatten(-2)
