"""The MLLA host: Han et al., "Demystify Mamba in Vision", NeurIPS 2024 (arXiv 2405.16605).

Four stages of pre-norm blocks with a position encoding before each half, x + conv3x3(x), and no position table;
a stem of five convolutions, and three convolutions between stages. Every mechanism, of quadratic cost or linear,
sees the whole grid with all heads; the gate of the paper's block belongs to the mechanism `mlla`.

Any image size: images are padded at the right and bottom to a multiple of 4, odd maps between stages to even ones,
as in the published dense backbones. Padding is part of the grid.
"""

from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from linsight.attention import Rename
from linsight.ops import Grid

from ..parts.conv_pyramid import ConvPyramid, stem_names
from ..parts.convs import CPE
from ..parts.stages import PreNorm, StageSize
from ..plan import Choice
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer


class MLLABlock(PreNorm):
    """Position encoding, attention, position encoding, MLP. As published, the layer's projections are the block's."""

    published = tuple(Rename(f"{name}.", f"attn.{name}.") for name in ("in_proj", "act_proj", "dwc", "out_proj"))

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__(dim, attn, mlp, drop_path=drop_path, **factory)
        self.cpe1 = CPE(dim, **factory)
        self.cpe2 = CPE(dim, **factory)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + H*W, C)`; the shape is kept."""
        x = self.add_attention(self.cpe1(x, grid), grid)
        return self.add_mlp(self.cpe2(x, grid), grid)


class MLLATransformer(ConvPyramid):
    """The host."""

    residual_stem = True
    published = (*stem_names("conv1", "conv2.0", "conv2.1", "conv3.0", "conv3.1"), *ConvPyramid.published)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention and MLP, each behind a position encoding."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio), **factory)
        return MLLABlock(size.dim, layer, mlp, drop_path=drop_path, **factory)


_CFG = {"first_conv": "stages.0.downsample.first.conv", "classifier": "head.fc", "crop_mode": "center"}


def _host(size: str, width: int, depths: tuple[int, ...], heads: int) -> Host:
    stages = tuple(StageSize(width * 2**i, depths[i], heads * 2**i) for i in range(4))
    return Host(f"mlla_pyramid_{size}", MLLATransformer, {"stages": stages}, _CFG, FOUR_MAPS)


add_hosts(
    _host("tiny", 64, (2, 4, 8, 4), 2),
    _host("small", 64, (3, 6, 21, 6), 2),
    _host("base", 96, (3, 6, 21, 6), 3),
)
