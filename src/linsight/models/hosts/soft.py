"""The SOFT host: Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021 (arXiv 2110.11945).

Four stages behind convolutions of 3x3 with batch norm and ReLU, three of them before the first stage and one before
each other, with a learned position table each. In the first three the norm stands behind each half of a block,
x <- LN(x + attn(x)), x <- LN(x + mlp(x)), where the GELU is the approximation by tanh, and in training single numbers
of a branch are dropped, at the rate of stochastic depth. The last stage has PVT's class token and pre-norm blocks.
Every mechanism, of quadratic cost or linear, sees the whole grid.

Any image size: strides round upwards, and tables are resampled (bilinear, as published) to any other grid.
"""

from functools import partial
from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from linsight.attention import Rename
from linsight.ops import Grid

from ..parts.conv_pyramid import ConvDown
from ..parts.stages import PreNorm, StageSize
from ..plan import Choice
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer
from .pvt import PyramidVisionTransformer


class PostNorm(PreNorm):
    """LN(x + attn(x)), then LN(x + mlp(x)). What is dropped in training are single numbers of a branch."""

    published = (
        *(Rename(f"att.{name}.", f"{name}.") for name in ("norm1", "norm2")),
        *(Rename(f"att.ff{i}.", f"mlp.fc{i}.") for i in (1, 2)),
        Rename("att.mha.", "attn."),
    )

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__(dim, attn, mlp, **factory)
        self.drop = nn.Dropout(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + H*W, C)`; the shape is kept."""
        x = self.norm1(x + self.drop(self.attn(x, grid)))
        return self.norm2(x + self.drop(self.mlp(x)))


class SoftTransformer(PyramidVisionTransformer):
    """The host: PVT's, but for what comes before stages and for the blocks of all but the last one."""

    reduces = False

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> Any:
        """Three convolutions, or one."""
        return ConvDown(in_dim, ((dim, 2),) if i else ((32, 2), (32, 1), (dim, 2)), **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Norms behind, in the last stage PVT's block."""
        if last:
            return super().make_block(size, choice, drop_path=drop_path, grid=grid, last=last, **factory)
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        act = partial(nn.GELU, approximate="tanh")
        mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio), act_layer=act, **factory)
        return PostNorm(size.dim, layer, mlp, drop_path=drop_path, **factory)


_CFG = {"first_conv": "stages.0.downsample.convs.0.conv", "classifier": "head.fc"}


def _host(size: str, third: int, depths: tuple[int, ...]) -> Host:
    """Heads are 32 wide."""
    widths = (64, 128, third, 512)
    stages = tuple(StageSize(width, depth, width // 32) for width, depth in zip(widths, depths, strict=True))
    return Host(f"soft_pyramid_{size}", SoftTransformer, {"stages": stages}, _CFG, FOUR_MAPS, stride=0)


add_hosts(
    _host("tiny", 320, (1, 2, 3, 2)),
    _host("small", 320, (1, 3, 20, 4)),
    _host("medium", 288, (1, 3, 29, 5)),
    _host("large", 320, (1, 3, 40, 5)),
    _host("huge", 352, (1, 5, 49, 5)),
)
