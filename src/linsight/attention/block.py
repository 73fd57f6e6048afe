"""Mechanisms that are more than an attention: a whole block in place of the host's."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from linsight.ops import LayoutLike

from .capabilities import Capabilities, Structure
from .core import Rename
from .nodes import Node


class Block(Node):
    """A mechanism registered with `kind="block"`: residual connections, norms and MLP are its own.

    The constructor takes `(dim, num_heads, *, mlp_ratio, drop_path, ..., device=None, dtype=None)`;
    its other keyword arguments are the mechanism's options. `grid` and `index` as of a Core.
    """

    capabilities: Capabilities = Capabilities()
    structure: Structure = Structure()
    published: ClassVar[tuple[Rename, ...]] = ()
    published_model: ClassVar[tuple[Rename, ...]] = ()  # key map of a model of such `blocks` and a last `norm`
    unmet: ClassVar[Mapping[str, str]] = {}  # as of a `Core`
    takes: ClassVar[tuple[str, ...]] = ("mlp_ratio", "drop_path_rate")  # what of a host's blocks shapes it, too

    def forward(self, x: Tensor, layout: LayoutLike | None = None, *, keep: Tensor | None = None) -> Tensor:
        """The residual stream `(B, P + H*W, C)` in and out; `keep` as in `Attention`.

        With `@each_image` it takes packed batches, too, and itself sees the images of one grid at a time.
        """
        raise NotImplementedError

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser should not decay, beyond 1-d ones."""
        return set()
