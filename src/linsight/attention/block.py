"""Mechanisms that are more than an attention: a whole block in place of the host's."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import LayoutLike

from .core import Capabilities, Rename
from .registry import mechanism


class Block(nn.Module):
    """A mechanism registered with `kind="block"`: residual connections, norms and MLP are its own.

    The constructor takes `(dim, num_heads, *, mlp_ratio, drop_path, ..., device=None, dtype=None)`;
    its other keyword arguments are the mechanism's options. `grid` and `index` as of a Core.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()
    published: ClassVar[tuple[Rename, ...]] = ()

    def forward(self, x: Tensor, layout: LayoutLike, *, keep: Tensor | None = None) -> Tensor:
        """The residual stream `(B, P + H*W, C)` in and out; `keep` as in `Attention`.

        With `@each_image` it takes packed batches, too, and itself sees the images of one grid at a time.
        """
        raise NotImplementedError

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimiser should not decay, beyond 1-d ones."""
        return set()


def is_block(name: str) -> bool:
    """Whether the mechanism `name` replaces the block of its host."""
    return mechanism(name).kind == "block"


def create_block(
    name: str,
    dim: int,
    num_heads: int,
    *,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    grid: tuple[int, int] | None = None,
    index: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Block:
    """A block of the mechanism `name`, which must be one of kind "block". `grid` and `index` as in `create_attention`.

    Raises:
        UnknownNameError: no such mechanism or option.
        LinsightError: the mechanism is an attention; hosts put that into a block of their own.
    """
    entry = mechanism(name)
    if entry.kind != "block":
        raise LinsightError(f"'{name}' is an attention, not a block: use create_attention")
    entry.check_options(options)
    shared = {"mlp_ratio": mlp_ratio, "drop_path": drop_path, "device": device, "dtype": dtype}
    block = entry.factory(dim, num_heads, **shared, **entry.placed(grid, index), **options)
    assert isinstance(block, Block)
    return block
