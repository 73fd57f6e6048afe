"""Attention on feature maps, for convolutional networks."""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import create_attention, one_node
from linsight.errors import LinsightError
from linsight.ops import Grid, unflatten


class Attention2d(nn.Module):
    """A mechanism between convolutions: `(B, C, H, W)` in and out, of any height and width.

    Norm and residual are the network's: `x + attention(norm(x))`. Maps in channels_last come out in channels_last,
    with no copy on the way.

    Args:
        channels, num_heads: of the map.
        attention: the mechanism.
        grid: the height and width that position tables are made for, of mechanisms that have them.
        options: as of `create_attention`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 8,
        attention: str = "inline",
        *,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layer = create_attention(attention, channels, num_heads, grid=grid, device=device, dtype=dtype, **options)

    @one_node
    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Mix the places of `x`; `keep` `(B, H, W)` is False where they are not to be seen.

        Raises:
            CapabilityError: the mechanism cannot drop places.
            LinsightError: `x` is no map, or `keep` does not fit it.
        """
        if x.ndim != 4 or (keep is not None and keep.shape != (x.shape[0], *x.shape[2:])):
            kept = "" if keep is None else f", and keep {tuple(keep.shape)}"
            raise LinsightError(
                f"a map has shape {tuple(x.shape)}{kept}: give (batch, channels, H, W) and (batch, H, W)"
            )
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        out = self.layer(tokens, Grid(height, width), keep=None if keep is None else keep.flatten(1))
        out = unflatten(out.transpose(1, 2), 2, (height, width))
        return out.contiguous() if x.is_contiguous() else out

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample parameters that lie on a grid to another height and width."""
        self.layer.set_grid(grid)
