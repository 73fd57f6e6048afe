"""VWFormer: windows that look at contexts of their own size and 2, 4 and 8 times as wide, at the cost of windows.

Yan et al., "Multi-Scale Representations by Varying Window Attention for Semantic Segmentation", ICLR 2024 (arXiv
2404.16573). A map is cut into 8x8 windows. The context of a window, R times as high and wide, has as many tokens as
the window: channels are first reduced by R^2, then R x R pixels become one token. What of a context lies outside of the
map is a copy of what lies inside (copy-shift padding).

The paper's maps divide by 8. Others are padded to it at the right and bottom by zeros, which contexts see, as they see
the zeros around a map; the pooled map is of the image alone. Where a window has an odd side, the copies at its left are
one pixel fewer than at its right. In a graph of any size windows have several pixels a side; a side of one, of a map of
8 pixels or fewer, is a graph of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Paper
from linsight.errors import LinsightError
from linsight.ops import attend, divided, unflatten

from .base import ConvNormReLU, Decoder, Pooled, cut, enlarged
from .mlp import Mixed
from .table import DecoderRow, add_decoders

GRID = 8  # windows along each side
LOW = 48  # channels of the finest map beside the rest


class VaryingWindows(nn.Module):
    """Attention of each window of a map to a context `ratio` times as high and wide."""

    def __init__(self, dim: int, ratio: int, num_heads: int = 8, **factory: Any) -> None:
        super().__init__()
        self.ratio, self.num_heads = ratio, num_heads
        self.reduce = ConvNormReLU(dim, dim // ratio**2, ratio, **factory)
        self.reduce[0].padding = 0  # type: ignore[assignment]
        self.q, self.k, self.v = (nn.Conv2d(dim, dim, 1, **factory) for _ in range(3))
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False, **factory), nn.BatchNorm2d(dim, **factory))

    def forward(self, x: Tensor, sides: Sequence[Any]) -> Tensor:
        """`(B, dim, 8 p, 8 r)`, of windows of the sides p and r; the shape is kept."""
        batch = x.shape[0]
        before, behind = self.ratio // 2 - 1, self.ratio // 2
        context = self.context(self.reduce(F.pad(x, (before, behind, before, behind))), sides)
        q, k, v = (self._windows(y, sides) for y in (self.q(x), self.k(context), self.v(context)))
        out = attend(q, k, v).transpose(1, 2).flatten(2)  # (B * 64, p * r, C)
        out = unflatten(unflatten(out, 1, sides), 0, (batch, GRID, GRID))
        out = out.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, r)
        return self.proj(out.flatten(4, 5).flatten(2, 3))

    def context(self, x: Tensor, sides: Sequence[Any]) -> Tensor:
        """The contexts of all windows, which lie as the windows do: `(B, C, 8 p, 8 r)` -> `(B, C R^2, 8 p, 8 r)`."""
        for axis, side in zip((2, 3), sides, strict=True):
            x = x.index_select(axis, self._places(side, x.device))
        for axis, side in ((3, sides[1]), (2, sides[0])):
            x = unflatten(x, axis, (GRID * side, self.ratio))
        return x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)  # (B, c, 8 p, R, 8 r, R) -> (B, c R^2, 8 p, 8 r)

    def _places(self, side: Any, device: torch.device) -> Tensor:
        """Rows of a map of 8 `side` that the contexts of its windows have, one window after the other."""
        length = self.ratio * side
        first = (length - side) // 2
        window, offset = divided(torch.arange(GRID * length, device=device), length)
        place = window * side + offset - first
        inside = torch.where(place < 0, place + length, place)
        return torch.where(place >= GRID * side, place - length, inside)

    def _windows(self, x: Tensor, sides: Sequence[Any]) -> Tensor:
        """`(B, C, 8 p, 8 r)` -> `(B * 64, heads, p * r, C / heads)`."""
        x = unflatten(unflatten(x, 3, (GRID, sides[1])), 2, (GRID, sides[0]))
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)
        return unflatten(x, 2, (self.num_heads, x.shape[2] // self.num_heads)).transpose(1, 2)


class VWFormer(Decoder):
    """The decoder: all maps but the finest are mixed at the size of the second, read at several scales, and joined by
    48 channels of the finest.

    num_heads: of each scale.
    ratios: how much wider than a window each context is.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 256,
        *,
        num_heads: int = 8,
        ratios: Sequence[int] = (2, 4, 8),
        strides: Sequence[int] | None = None,
        dropout: float = 0.1,
        **factory: Any,
    ) -> None:
        super().__init__(channels, num_classes, width, strides=strides, dropout=dropout, **factory)
        for ratio in ratios:
            if ratio not in (2, 4, 6, 8):
                raise LinsightError(
                    f"ratios={tuple(ratios)}: a context is 2, 4, 6 or 8 windows wide, of the 8 there are"
                )
            if width % ratio**2 or width % num_heads:
                raise LinsightError(
                    f"width={width} must divide by the square of each of ratios={tuple(ratios)} and by {num_heads} "
                    f"heads: pass a multiple of {max(ratios) ** 2}, or ratios=(2, 4)"
                )
        first = min(1, len(self.channels) - 1)
        times = [self.times(i, first) for i in range(first, len(self.channels))]
        self.mix = Mixed(self.channels[first:], times, width, **factory)
        self.short, self.pool = ConvNormReLU(width, width, **factory), Pooled(width, width, 1, **factory)
        self.scales = nn.ModuleList(VaryingWindows(width, ratio, num_heads, **factory) for ratio in ratios)
        self.join = ConvNormReLU(width * (2 + len(ratios)), width, **factory)
        self.low = ConvNormReLU(self.channels[0], LOW, **factory) if self.channels[1:] else None
        self.fuse = ConvNormReLU(width + LOW, width, **factory) if self.low else None

    def joined(self, maps: Sequence[Tensor]) -> Tensor:
        """`(B, width, H_0, W_0)`."""
        x = self.mix(maps[1:] or maps)
        height, width = x.shape[2:]
        sides = [(side + GRID - 1) // GRID for side in (height, width)]
        padded = F.pad(x, (0, GRID * sides[1] - width, 0, GRID * sides[0] - height))
        scales = [cut(scale(padded, sides), height, width) for scale in self.scales]
        x = self.join(torch.cat([self.short(x), self.pool(x), *scales], dim=1))
        if self.low is None or self.fuse is None:
            return x
        return self.fuse(torch.cat([enlarged(x, self.times(1), maps[0].shape[2:]), self.low(maps[0])], dim=1))


add_decoders(
    DecoderRow(
        "vwformer",
        VWFormer,
        "attention of windows to contexts of several widths, of all maps but the finest, which joins them",
        256,
        Paper(
            "Multi-Scale Representations by Varying Window Attention for Semantic Segmentation",
            "2404.16573",
            "ICLR 2024",
        ),
    )
)
