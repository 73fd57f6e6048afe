"""The contract of a mechanism: a Core."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from linsight.errors import CapabilityError
from linsight.ops import Layout, State, Tile

from .capabilities import Capabilities, Structure
from .rounds import Done, Round, dense, scan
from .tokens import Tokens


class Rename(NamedTuple):
    """One rule of a key map: keys that start with `published` start with `ours` here.

    ones: trailing axes of size 1 that weights have there, as those of 1x1 convolutions; -1: none, whatever a rule of a
        part says.
    """

    published: str
    ours: str
    ones: int = 0


class Core(nn.Module):
    """A mechanism without projections: tokens in, tokens out.

    One that streams sets `rounds` and defines `read`; the dense form, tiles and ranks follow from them. One without
    states that merge defines `forward`, whose signature has what it uses: `score_bias` only where there are scores.

    The constructor takes `(dim, num_heads, *, ..., device=None, dtype=None)`; its other keyword arguments are the
    mechanism's options. `dim` is the width of the values, heads merged. One with parameters that lie on a grid, as a
    position table, also takes `grid`, the height and width that its keys are built for; it works on any other, and
    `set_grid` moves it there for good. `query_grid` is that of its queries, which a reduction makes another one. One
    that differs from block to block also takes `index`, its block's place in the model, from 0.
    """

    capabilities: Capabilities = Capabilities()
    structure: Structure = Structure()
    rounds: tuple[Round, ...] = ()
    halo: int = 0  # by how many further tokens on each side `read` sees a tile
    placed: bool = False  # where tokens lie matters to it, though neither its halo nor a round tells so
    causal: bool = False  # built in its causal form
    projections: ClassVar[str] = "qkv"  # the layout of the layer around it, see `projections.py`
    reduced_projections: ClassVar[str] = "q_kv"  # those where keys are of a coarser grid
    qkv_bias: ClassVar[bool] = True  # False: projected without one, whatever the host has
    reads_residual: ClassVar[bool] = False  # it asks for `tokens.residual`
    largest: ClassVar[float] = 1e3  # activations up to which the formula stays among the numbers of bfloat16
    held: ClassVar[str] = ""  # what outputs depend on and, as published, gradients do not
    steps: ClassVar[str] = ""  # by what outputs jump, as by hashes: tokens that are rounded otherwise may move them far
    layer: ClassVar[type[nn.Module] | None] = None  # the `Attention` around it, where the usual one does not do
    extra_dim: int = 0  # width of `tokens.extra`
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

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """Outputs `(B, M, H, E)`: the rounds over the whole grid.

        `layout` is that of q and x; `context_layout` that of k, v and keep where it differs.
        """
        if self.causal:
            return scan(self, tokens, [Tile.whole(layout.grid, layout.sizes)])
        return dense(self, tokens, layout, context_layout)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser should not decay, beyond 1-d ones."""
        return set()

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        heads: Any = getattr(self, "num_heads", None)
        return "" if heads is None else f"num_heads={heads}"
