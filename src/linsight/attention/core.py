"""The contract of a mechanism: a Core."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from linsight.errors import CapabilityError
from linsight.ops import HEAD_BASE, Layout, State, Tile, Turn, accumulator, unflatten

from .capabilities import Capabilities, Structure
from .rounds import Done, Round, dense, scan
from .tokens import Tokens

OPEN_SILU = 1.2784645427610738  # SiLU of it is 1


class Rename(NamedTuple):
    """One rule of a key map: keys that start with `published` start with `ours` here.

    ones: trailing axes of size 1 that weights have there, as those of 1x1 convolutions; -1: none, whatever a rule of a
        part says.
    """

    published: str
    ours: str
    ones: int = 0


class Renews(NamedTuple):
    """How training makes anew what is neither a parameter nor a state, as random features.

    how: "drawn" by `redraw()`, or "fitted" by `fit(tokens)`.  every: so many updates, as published.
    """

    how: Literal["drawn", "fitted"]
    every: int


class Additive(nn.Module):
    """A part whose output is added to what queries read, or to queries and keys."""

    def add_nothing(self) -> None:
        """Set its parameters to give zeros."""
        raise NotImplementedError


class Core(nn.Module):
    """A mechanism without projections: tokens in, tokens out.

    One that streams sets `rounds` and defines `read`; the dense form, tiles and ranks follow from them. One without
    states that merge defines `forward`, whose signature has what it uses: `score_bias` only where there are scores.

    The constructor takes `(dim, num_heads, *, ..., device=None, dtype=None)`; its other keyword arguments are the
    mechanism's options. `dim` is the width of the values, heads merged; with an option `head_dim` other than 0 they
    have a width of their own, `inner_dim`, and `num_heads` need not divide `dim`. One with parameters that lie on a
    grid, as a position table, also takes `grid`, the height and width that its keys are built for; it works on any
    other, and `set_grid` moves it there for good. `query_grid` is that of its queries, which a reduction makes another
    one. One that differs from block to block also takes `index`, its block's place in the model, from 0.

    Hosts draw the initial weights of all linear layers. One that has some of its own defines `init_weights()`, as
    timm's modules do; hosts call it afterwards. Layers and blocks may have it too.

    With `turns`, a mechanism has the rotary option, which `create_core` sets. Each head of q and k is turned by the
    place of its token, prefix tokens are not: "tokens" where the formula knows them by their products alone, and all of
    it sees turned ones; "features" where what normalises sees them as they are. The features of a head are `alike`
    parts, as those by sign, that are turned alike.
    """

    capabilities: Capabilities = Capabilities()
    structure: Structure = Structure()
    rounds: tuple[Round, ...] = ()
    halo: int = 0  # by how many further tokens on each side `read` sees a tile
    placed: bool = False  # where tokens lie matters to it, though neither its halo nor a round tells so
    causal: bool = False  # built in its causal form
    rotary: bool = False  # made with the rotary option
    unturned: str = ""  # why the rotary option does not go with the other options
    cut_up: bool = False  # tiles or ranks stand in the place of `forward`, and turn what each of them sees
    projections: ClassVar[str] = "qkv"  # the layout of the layer around it, see `projections.py`
    reduced_projections: ClassVar[str] = "q_kv"  # those where keys are of a coarser grid
    qkv_bias: ClassVar[bool] = True  # False: projected without one, whatever the host has
    reads_residual: ClassVar[bool] = False  # it asks for `tokens.residual`
    turns: ClassVar[Literal["", "tokens", "features"]] = ""  # what the rotary option turns; "": it has none
    alike: ClassVar[int] = 1
    largest: ClassVar[float] = 1e3  # activations up to which the formula stays among the numbers of bfloat16
    held: ClassVar[str] = ""  # what outputs depend on and, as published, gradients do not
    renews: ClassVar[Renews | None] = None  # how training makes anew what is random, or fitted to tokens
    steps: ClassVar[str] = ""  # by what outputs jump, as by hashes: tokens that are rounded otherwise may move them far
    layer: ClassVar[type[nn.Module] | None] = None  # the `Attention` around it, where the usual one does not do
    extra_dim: int = 0  # width of `tokens.extra`
    open_gate: ClassVar[float | None] = None  # the value of `tokens.extra` at which it, a gate, changes nothing
    inner_dim: int | None = None  # width of q, k and v, heads merged, where it is not `dim`
    out_dim: int | None = None  # width of the outputs, heads merged, where it is not `dim`
    published: ClassVar[tuple[Rename, ...]] = ()  # key map of the layer, beyond qkv and proj
    unmet: ClassVar[Mapping[str, str]] = {}  # of `WAYS`, those in which no graph of it leaves, and why

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Outputs `(B, n, H, E)` of the tile's own tokens, of what its halo sees and the finished states."""
        raise CapabilityError(f"{type(self).__name__} has no mergeable state: it cannot be streamed or split")

    def follow(self, tokens: Tokens, tile: Tile, before: State) -> Tensor:
        """Outputs of the causal form: `before` is the state of all tokens before those of `tile`, None at the start."""
        raise CapabilityError(f"{type(self).__name__} has no causal form")

    def lift(self, tokens: Tokens, keys: Tile, queries: Tile) -> Tokens:
        """The tokens for `read` where keys lie on a coarser grid: a core that convolves v brings it to the queries'."""
        return tokens

    def redraw(self) -> None:
        """Draw anew what is random and neither a parameter nor a state; training does so where it `renews`."""

    def fit(self, tokens: Tokens) -> None:
        """Fit to tokens what is neither a parameter nor a state; training does so where it `renews` so."""

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """Outputs `(B, M, H, E)`: the rounds over the whole grid.

        `layout` is that of q and x; `context_layout` that of k, v and keep where it differs.
        """
        if self.causal:
            return scan(self, tokens, [Tile.whole(layout.grid, layout.sizes)])
        return dense(self, tokens, layout, context_layout)

    def __call__(self, tokens: Tokens, layout: Layout, **beside: Any) -> Any:
        """`forward`, with the tokens that it is to see."""
        if self.rotary and not self.cut_up:
            source: Layout = beside.get("context_layout") or layout
            keys, queries = (Tile.whole(side.grid, side.sizes) for side in (source, layout))
            tokens = self.placed_tokens(tokens, queries, keys)
        return super().__call__(tokens, layout, **beside)

    def placed_tokens(self, tokens: Tokens, queries: Tile, keys: Tile | None = None) -> Tokens:
        """The tokens as rounds and `read` are to see them: q and k turned, where the rotary option turns tokens.

        They are then in the accumulator's dtype: outputs are in that of v.
        """
        if not self.rotary or self.turns != "tokens":
            return tokens
        return tokens._replace(q=self.by_place(tokens.q, queries), k=self.by_place(tokens.k, keys or queries))

    def by_place(self, x: Tensor, tile: Tile) -> Tensor:
        """`x` `(B, n, H, D)` turned by the places of `tile`, in the accumulator's dtype; without rotary as it is."""
        turn = self.turn_of(x, tile)
        return x if turn is None else unflatten(turn.rotate(x.flatten(2)), 2, x.shape[2:])

    def turn_of(self, x: Tensor, tile: Tile) -> Turn | None:
        """The rotation of tokens or features `x` `(B, n, H, D)` of `tile`; None without the rotary option."""
        if not self.rotary:
            return None
        heads, width = x.shape[2:]
        where: dict[str, Any] = {"device": x.device, "dtype": accumulator(x.dtype)}
        return Turn.of(tile, heads * width, heads=heads * self.alike, base=HEAD_BASE, **where)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""

    def start_neutral(self) -> None:
        """Set what only adds to that which queries read, as convolutions of v, so that it adds nothing yet.

        For weights that come from softmax attention, which has no such terms. They learn from there.
        """
        for part in self.modules():
            if isinstance(part, Additive):
                part.add_nothing()

    def maps(self, dim: int, **factory: Any) -> dict[str, nn.Module]:
        """Maps of the tokens, `dim` wide, whose outputs are added to them before "q" or "k" is projected."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser should not decay, beyond 1-d ones."""
        return set()

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        heads: Any = getattr(self, "num_heads", None)
        return "" if heads is None else f"num_heads={heads}"
