"""The all-MLP decoder of SegFormer: each map by a linear layer to one width, all at the finest size, mixed by another.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", NeurIPS 2021 (arXiv
2105.15203), equation 4. Published with 256 channels, in its larger models with 768.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import Paper

from .base import ConvNormReLU, Decoder, enlarged
from .table import DecoderRow, add_decoders


class Mixed(nn.Module):
    """Maps, each by a linear layer, at the size of the first, mixed by a linear layer with batch norm and ReLU."""

    def __init__(self, channels: Sequence[int], times: Sequence[int], width: int, **factory: Any) -> None:
        super().__init__()
        self.times = tuple(times)  # as coarse as the first
        self.linear = nn.ModuleList(nn.Conv2d(dim, width, 1, **factory) for dim in channels)
        self.fuse = ConvNormReLU(width * len(channels), width, **factory)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """`(B, width, H_0, W_0)`."""
        size = maps[0].shape[2:]
        found = [
            enlarged(linear(x), times, size) for linear, x, times in zip(self.linear, maps, self.times, strict=True)
        ]
        return self.fuse(torch.cat(found, dim=1))


class MlpDecoder(Decoder):
    """The decoder."""

    margin = 1  # what lies between two tokens is of both

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 256,
        *,
        strides: Sequence[int] | None = None,
        dropout: float = 0.1,
        **factory: Any,
    ) -> None:
        super().__init__(channels, num_classes, width, strides=strides, dropout=dropout, **factory)
        self.mix = Mixed(self.channels, [self.times(i) for i in range(len(self.channels))], width, **factory)

    def joined(self, maps: Sequence[Tensor]) -> Tensor:
        """`(B, width, H_0, W_0)`."""
        return self.mix(maps)


add_decoders(
    DecoderRow(
        "mlp",
        MlpDecoder,
        "each map by a linear layer to one width, mixed at the finest size: SegFormer's light head",
        256,
        Paper(
            "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers",
            "2105.15203",
            "NeurIPS 2021",
        ),
    )
)
