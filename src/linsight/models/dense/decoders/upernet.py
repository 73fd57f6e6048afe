"""UPerNet: the coarsest map pooled at four scales, a feature pyramid from there to the finest, all maps mixed.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018 (arXiv 1807.10221), with 512 channels and
the auxiliary head that the recipes of backbones have beside it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import Paper

from .base import ConvNormReLU, Decoder, Pooled, enlarged
from .table import DecoderRow, add_decoders

SCALES = (1, 2, 3, 6)


class UPerNet(Decoder):
    """The decoder. Every convolution has batch norm and ReLU behind it; maps are enlarged bilinearly."""

    margin = 4

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 512,
        *,
        strides: Sequence[int] | None = None,
        dropout: float = 0.1,
        **factory: Any,
    ) -> None:
        super().__init__(channels, num_classes, width, strides=strides, dropout=dropout, **factory)
        *finer, last = self.channels
        self.pools = nn.ModuleList(Pooled(last, width, scale, **factory) for scale in SCALES)
        self.context = ConvNormReLU(last + len(SCALES) * width, width, 3, **factory)
        self.laterals = nn.ModuleList(ConvNormReLU(dim, width, **factory) for dim in finer)
        self.smooth = nn.ModuleList(ConvNormReLU(width, width, 3, **factory) for _ in finer)
        self.fuse = ConvNormReLU(width * len(self.channels), width, 3, **factory)

    def coarsest(self, x: Tensor) -> Tensor:
        """The coarsest map and its means, mixed."""
        return self.context(torch.cat([x, *(pool(x) for pool in self.pools)], dim=1))

    def joined(self, maps: Sequence[Tensor]) -> Tensor:
        """`(B, width, H_0, W_0)`."""
        *finer, x = maps
        found = [x]
        for i in reversed(range(len(finer))):
            fine = finer[i]
            x = self.laterals[i](fine) + enlarged(x, self.times(i + 1, i), fine.shape[2:])
            found.append(self.smooth[i](x))
        size = maps[0].shape[2:]
        return self.fuse(torch.cat([enlarged(x, self.times(i), size) for i, x in enumerate(reversed(found))], dim=1))


add_decoders(
    DecoderRow(
        "upernet",
        UPerNet,
        "the coarsest map pooled at four scales, and a feature pyramid, all maps mixed: the heavy head of most papers",
        512,
        Paper("Unified Perceptual Parsing for Scene Understanding", "1807.10221", "ECCV 2018"),
        auxiliary=True,
    )
)
