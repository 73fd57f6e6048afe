"""The TransNeXt host: Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024.

The backbone of arXiv 2311.17132, by the published code of MoH (arXiv 2410.11842): four stages of pre-norm blocks, each
behind an overlapping convolution of stride 4, 2, 2, 2 with LayerNorm. In the MLP one half of the hidden channels passes
a depthwise convolution of 3x3 and GELU and gates the other, which tells positions; there is no position table. Every
mechanism, of quadratic cost or linear, sees the whole grid; the window and the pooled grid of the published attention
belong to `transnext`.

Any image size: strides round upwards, and nothing is padded to a multiple.
"""

import math
from typing import Any

from timm.layers import GluMlp
from torch import Tensor, nn

from linsight.attention import Rename, TokenConv
from linsight.ops import Grid, copied

from ..parts.convs import ConvEmbed
from ..parts.pyramid import PlainPyramid
from ..parts.stages import PreNorm, StageSize
from ..plan import Choice
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer

_EPS = 1e-6


class ConvGlu(GluMlp):
    """timm's gated MLP with a depthwise convolution of 3x3 in the gate: fc2(GELU(conv(a)) * b), [a, b] = fc1(x)."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__(dim, 2 * hidden, act_layer=nn.GELU, gate_last=False, **factory)
        self.dwconv = TokenConv(hidden, **factory)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(self.dwconv(gate, (grid.height, grid.width))) * value)


class TransNeXtBlock(PreNorm):
    """A pre-norm block with the gated MLP."""

    published = (Rename("mlp.dwconv.dwconv.", "mlp.dwconv."),)

    def __init__(self, dim: int, attn: nn.Module, mlp: ConvGlu, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__(dim, attn, mlp, drop_path=drop_path, eps=_EPS, **factory)
        self.mlp_on_grid = True


class NormedEmbed(ConvEmbed):
    """The convolution in front of a stage behind the norm of the stage before, if there is one, and LayerNorm."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, *, normed: bool, **factory: Any) -> None:
        super().__init__(in_dim, dim, kernel, stride, kernel // 2, **factory)
        self.before = nn.LayerNorm(in_dim, eps=_EPS, **factory) if normed else None

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """A map to tokens `(B, H*W, C)` and their grid."""
        if self.before is not None:
            x = copied(self.before(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return super().forward(x)


class TransNeXtTransformer(PlainPyramid):
    """The host."""

    published = (
        *(Rename(f"patch_embed{i + 1}.", f"stages.{i}.downsample.") for i in range(4)),
        *(Rename(f"block{i + 1}.", f"stages.{i}.blocks.") for i in range(4)),
        *(Rename(f"norm{i + 1}.", f"stages.{i + 1}.downsample.before.") for i in range(3)),
        Rename("norm4.", "norm."),
        Rename("head.", "head.fc."),
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.apply(_init_conv)

    def make_norm(self, dim: int, **factory: Any) -> nn.Module:
        """The norm of the last stage."""
        return nn.LayerNorm(dim, eps=_EPS, **factory)

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> NormedEmbed:
        """7x7 of stride 4, then 3x3 of stride 2."""
        kernel, stride = (3, 2) if i else (7, 4)
        return NormedEmbed(in_dim, dim, kernel, stride, normed=bool(i), **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention and the gated MLP, whose hidden layer is 2/3 as wide as the ratio says."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        mlp = ConvGlu(size.dim, 2 * int(size.mlp_ratio * size.dim) // 3, **factory)
        return TransNeXtBlock(size.dim, layer, mlp, drop_path=drop_path, **factory)


def _init_conv(module: nn.Module) -> None:
    """The published initial weights of a convolution; nothing to any other module."""
    if isinstance(module, nn.Conv2d):
        fan = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_CFG = {"first_conv": "stages.0.downsample.proj", "classifier": "head.fc"}


def _host(size: str, width: int, third: int) -> Host:
    """Heads are 24 wide."""
    stages = tuple(
        StageSize(width << i, third if i == 2 else 5, (width << i) // 24, 8.0 if i < 2 else 4.0) for i in range(4)
    )
    return Host(f"transnext_{size}", TransNeXtTransformer, {"stages": stages}, _CFG, FOUR_MAPS)


add_hosts(_host("small", 72, 22), _host("base", 96, 23))
