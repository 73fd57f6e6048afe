"""Semantic FPN: a feature pyramid, each map brought to the finest size step by step, and their sum.

Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019 (arXiv 1901.02446), section 3; the pyramid is
torchvision's, of 256 channels, the steps have 128. Norms are batch norms, as in the published recipes of backbones.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from linsight.attention import Paper

from .base import ConvNormReLU, Decoder, enlarged, feature_pyramid
from .table import DecoderRow, add_decoders


class SemanticFpn(Decoder):
    """The decoder. Map i goes through i steps of a 3x3 convolution and the size of the next finer map.

    The finest goes through one convolution.

    fpn_width: channels of the pyramid.
    """

    margin = 6

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 128,
        *,
        fpn_width: int = 256,
        strides: Sequence[int] | None = None,
        dropout: float = 0.1,
        **factory: Any,
    ) -> None:
        super().__init__(channels, num_classes, width, strides=strides, dropout=dropout, **factory)
        self.pyramid = feature_pyramid(self.channels, fpn_width, **factory)
        self.steps = nn.ModuleList(
            nn.ModuleList(ConvNormReLU(width if j else fpn_width, width, 3, **factory) for j in range(max(1, i)))
            for i in range(len(self.channels))
        )

    def joined(self, maps: Sequence[Tensor]) -> Tensor:
        """`(B, width, H_0, W_0)`."""
        sizes = [x.shape[2:] for x in maps]
        found = list(self.pyramid({str(i): x for i, x in enumerate(maps)}).values())
        steps: Any = self.steps
        total: Any = 0
        for i, (x, convs) in enumerate(zip(found, steps, strict=True)):
            for j, conv in enumerate(convs, 1):
                x = enlarged(conv(x), self.times(i - j + 1, i - j), sizes[i - j]) if i else conv(x)
            total = total + x
        return total


add_decoders(
    DecoderRow(
        "semantic_fpn",
        SemanticFpn,
        "a feature pyramid, each map brought to the finest size by convolutions, and their sum",
        128,
        Paper("Panoptic Feature Pyramid Networks", "1901.02446", "CVPR 2019"),
    )
)
