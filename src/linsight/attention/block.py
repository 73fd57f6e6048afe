"""Mechanisms that are more than an attention: a whole block in place of the host's."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from linsight.ops import Layout, LayoutLike

from .capabilities import Capabilities, Structure
from .checks import check_asked, check_beside, entered
from .core import Rename
from .nodes import Node
from .packed import each_image


class Block(Node):
    """A mechanism registered with `kind="block"`: residual connections, norms and MLP are its own.

    The constructor takes `(dim, num_heads, *, mlp_ratio, drop_path, ..., device=None, dtype=None)`, sets `dim`, and
    its other keyword arguments are the mechanism's options. `grid` and `index` as of a Core.
    """

    dim: int

    capabilities: Capabilities = Capabilities()
    structure: Structure = Structure()
    published: ClassVar[tuple[Rename, ...]] = ()
    published_model: ClassVar[tuple[Rename, ...]] = ()  # key map of a model of such `blocks` and a last `norm`
    unmet: ClassVar[Mapping[str, str]] = {}  # as of a `Core`
    takes: ClassVar[tuple[str, ...]] = ("mlp_ratio", "drop_path_rate")  # what of a host's blocks shapes it, too

    @each_image
    def forward(self, x: Tensor, layout: LayoutLike | None = None, *, keep: Tensor | None = None) -> Tensor:
        """The residual stream `(B, P + H*W, C)` in and out, once it fits; `keep` as in `Attention`."""
        found = entered(x, layout, dim=self.dim, weight=self.weight())
        check_asked(self, found, keep=keep)
        check_beside(x, found, keep=keep)
        return self.mix(x, found, keep)

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The residual stream after the block; `x`, `layout` and `keep` as of a `Layer`."""
        raise NotImplementedError

    def weight(self) -> Tensor | None:
        """See `Layer`."""
        return None

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser should not decay, beyond 1-d ones."""
        return set()
