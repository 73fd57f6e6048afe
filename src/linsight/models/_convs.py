"""Convolutional parts that hosts share."""

from typing import Any

from torch import Tensor, nn

from linsight.ops import Grid, depthwise_conv, pad_prefix


class CPE(nn.Conv2d):
    """Conditional position encoding, x + conv3x3(x), depthwise, on tokens; prefix tokens pass by.

    Chu et al., "Conditional Positional Encodings for Vision Transformers", ICLR 2023 (arXiv 2102.10882).
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        """`(B, P + H*W, C)`; the shape is kept."""
        local = depthwise_conv(x[:, grid.prefix :], grid[:2], self.weight, self.bias)
        return x + pad_prefix(local, grid.prefix)
