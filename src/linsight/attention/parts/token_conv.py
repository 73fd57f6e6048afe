"""The depthwise convolution of tokens on their grid, which mechanisms and hosts add to what they mix."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import Tile, accumulator, depthwise_conv, full_precision, mask_tokens, shifted_products, traced

from ..core import Additive
from ..tokens import Tokens, merge_heads, split_heads


class TokenConv(nn.Conv2d, Additive):
    """A depthwise convolution of tokens that lie on a grid, of stride 1, with zeros around it.

    Args:
        dim: channels of its kernels.
        kernel_size: their side, odd.
        dilation: how many tokens their taps lie apart.
        repeats: so many times `dim` channels come, and share them: one kernel for all heads.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        *,
        dilation: int = 1,
        repeats: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        shape: dict[str, Any] = {"padding": kernel_size // 2 * dilation, "dilation": dilation, "groups": dim}
        super().__init__(dim, dim, kernel_size, **shape, bias=bias, device=device, dtype=dtype)
        self.repeats = repeats

    def add_nothing(self) -> None:
        """See `Additive`."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, size: tuple[int, int] | None = None, *, wide: bool = False, varies: bool = False
    ) -> Tensor:
        """`x` `(B, h*w, C)`, row by row; `size` (h, w). The shape is kept. Without a size, a map `(B, C, h, w)`.

        wide: computed in the accumulator's dtype, whatever autocast says; else as torch's convolution.
        varies: B does, from call to call, so a graph must not ask how a convolution of so many is best run.
        """
        if size is None:
            return super().forward(x)
        weight, bias, dilation = self.weight, self.bias, int(self.dilation[0])
        if self.repeats > 1:
            weight, bias = weight.repeat(self.repeats, 1, 1, 1), None if bias is None else bias.repeat(self.repeats)
        if varies and traced() and dilation == 1 and bias is not None:
            return (shifted_products(x, size, weight.transpose(0, 1)) + bias).to(x.dtype)
        if not wide:
            return depthwise_conv(x, size, weight, bias, dilation=dilation)
        dtype = accumulator(torch.promote_types(x.dtype, weight.dtype))
        with full_precision(x):
            bias = None if bias is None else bias.to(dtype)
            return depthwise_conv(x, size, weight.to(dtype), bias, dilation=dilation)


def grid_values(tokens: Tokens, tile: Tile) -> Tensor:
    """v of what `tile` sees of the grid: `(B, n, C)`, zero where a token is not kept."""
    return mask_tokens(merge_heads(tokens.v), tokens.keep)[:, tile.prefix :]


def convolved_values(conv: TokenConv, tokens: Tokens, tile: Tile) -> Tensor:
    """The convolution of v at the tile's own grid tokens: `(B, h*w, H, E)`, in the accumulator's dtype."""
    out = conv(grid_values(tokens, tile), tile.seen, wide=True)
    return split_heads(tile.inner_grid(out), tokens.v.shape[-2])


def add_behind(out: Tensor, local: Tensor, prefix: int) -> Tensor:
    """`out` `(B, prefix + n, H, E)` plus `local` `(B, n, H, E)`; prefix tokens get none."""
    return out + (F.pad(local, (0, 0, 0, 0, prefix, 0)) if prefix else local)
