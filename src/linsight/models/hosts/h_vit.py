"""The H-ViT^3 host: "ViT^3: Unlocking Test-Time Training in Vision", CVPR 2026 (arXiv 2512.01643).

Four stages of pre-norm blocks, each behind a position encoding, x + conv3x3(x), with a depthwise convolution inside
the MLP and no position table; a stem of five convolutions, three convolutions between stages, and batch norm before
the head. Every mechanism, of quadratic cost or linear, sees the whole grid with all heads.

Any image size: images are padded at the right and bottom to a multiple of 4, odd maps between stages to even ones,
as in the published dense backbones. Padding is part of the grid.
"""

from typing import Any

from torch import Tensor, nn

from linsight.ops import Grid

from ..parts.conv_pyramid import ConvPyramid, stem_names
from ..parts.convs import CPE, ConvMlp
from ..parts.stages import PreNorm, StageSize
from ..plan import Choice
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer


class HViTBlock(PreNorm):
    """Position encoding, attention, MLP."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__(dim, attn, mlp, drop_path=drop_path, **factory)
        self.cpe = CPE(dim, **factory)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + H*W, C)`; the shape is kept."""
        return super().forward(self.cpe(x, grid), grid)


class HierarchicalViT(ConvPyramid):
    """The host."""

    residual_stem = False
    published = (*stem_names(*(f"conv.{i}" for i in range(5))), *ConvPyramid.published)

    def make_norm(self, dim: int, **factory: Any) -> nn.Module:
        """Batch norm."""
        return nn.BatchNorm2d(dim, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention, behind a position encoding, and an MLP with a convolution."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        mlp = ConvMlp(size.dim, int(size.dim * size.mlp_ratio), **factory)
        return HViTBlock(size.dim, layer, mlp, drop_path=drop_path, **factory)


_CFG = {"first_conv": "stages.0.downsample.first.conv", "classifier": "head.fc", "crop_mode": "center"}


def _host(size: str, widths: tuple[int, ...], depths: tuple[int, ...]) -> Host:
    """Heads are 32 wide."""
    stages = tuple(StageSize(width, depth, width // 32) for width, depth in zip(widths, depths, strict=True))
    return Host(f"h_vit_{size}", HierarchicalViT, {"stages": stages}, _CFG, FOUR_MAPS)


add_hosts(
    _host("tiny", (64, 128, 320, 512), (1, 3, 9, 4)),
    _host("small", (64, 128, 320, 512), (2, 6, 18, 8)),
    _host("base", (96, 192, 448, 640), (2, 6, 18, 8)),
)
