"""The VAN host: Guo et al., "Visual Attention Network", Computational Visual Media 2023 (arXiv 2202.09741).

Four stages, each behind an overlapping convolution with batch norm, of stride 4 and then 2, and each with a LayerNorm
at its end. In a block batch norm stands in front of both halves, and a learned factor for each channel, 0.01 at the
start, behind them; the MLP has a depthwise convolution, and there is no position table. Every mechanism, of quadratic
cost or linear, sees the whole grid; that the published layer adds its input is the mechanism's own.

Any image size: strides round upwards, and nothing is padded to a multiple.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from linsight.attention import Node, Rename
from linsight.attention.parts.context import normed
from linsight.ops import Grid

from ..parts.conv_pyramid import ConvNorm, as_tokens
from ..parts.convs import with_dense_conv
from ..parts.pyramid import PlainPyramid
from ..parts.stages import Stage, StageSize
from ..plan import Choice
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import init_own, make_layer

_START = 1e-2  # of the factors


class OverlapDown(nn.Module):
    """A convolution whose kernel is larger than its stride, and batch norm: a map to tokens. Sides round upwards."""

    published = (Rename("proj.", "proj.conv."), Rename("norm.", "proj.norm."))

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, **factory: Any) -> None:
        super().__init__()
        self.stride = stride
        how = {"stride": stride, "padding": kernel // 2, "bias": True, "apply_act": False}
        self.proj = ConvNorm(in_dim, dim, kernel, **how, **factory)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tokens of a map of `size`."""
        return (size[0] + self.stride - 1) // self.stride, (size[1] + self.stride - 1) // self.stride

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, in_dim, H, W)` to tokens `(B, h*w, C)` and their grid."""
        return as_tokens(self.proj(x))


class BatchNormBlock(Node):
    """x + a attn(BN(x)), then x + b mlp(BN(x)), with a and b of the length of a token."""

    published: ClassVar[tuple[Rename, ...]] = (
        Rename("mlp.fc1.", "mlp.fc1.", ones=2),
        Rename("mlp.fc2.", "mlp.fc2.", ones=2),
        Rename("mlp.dwconv.dwconv.", "mlp.dwconv."),
    )

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm1d(dim, **factory)
        self.attn = attn
        self.norm2 = nn.BatchNorm1d(dim, **factory)
        self.mlp = mlp
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), _START, **factory))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), _START, **factory))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        x = x + self.drop_path(self.layer_scale_1 * self.attn(normed(self.norm1, x), grid))
        return x + self.drop_path(self.layer_scale_2 * self.mlp(normed(self.norm2, x), grid[:2]))


class TokenNorm(nn.LayerNorm):
    """A LayerNorm that is called as a block is."""

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """`(B, N, C)`; the shape is kept."""
        return super().forward(x)


class NormedStage(Stage):
    """A stage with a LayerNorm behind its last block."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int, **factory: Any) -> None:
        super().__init__(downsample, blocks)
        self.norm = TokenNorm(dim, eps=1e-6, **factory)

    def mixes(self) -> list[nn.Module]:
        """The blocks, and the norm."""
        return [*self.blocks, self.norm]

    def run(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The blocks, and the norm."""
        x, grid = super().run(x, grid)
        return self.norm(x), grid


class VisualAttentionNetwork(PlainPyramid):
    """The host."""

    published: ClassVar[tuple[Rename, ...]] = (
        *(Rename(f"patch_embed{i + 1}.", f"stages.{i}.downsample.") for i in range(4)),
        *(Rename(f"block{i + 1}.", f"stages.{i}.blocks.") for i in range(4)),
        *(Rename(f"norm{i + 1}.", f"stages.{i}.norm.") for i in range(4)),
        Rename("head.", "head.fc."),
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stages.apply(_init)

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> OverlapDown:
        """7x7 to a quarter of the sides, then 3x3 to half between stages."""
        return OverlapDown(in_dim, dim, *((3, 2) if i else (7, 4)), **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Attention and an MLP with a convolution, each behind batch norm and scaled."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        mlp = with_dense_conv(MlpWithDepthwiseConv(size.dim, int(size.dim * size.mlp_ratio), **factory))
        return BatchNormBlock(size.dim, layer, mlp, drop_path=drop_path, **factory)

    def make_stage(
        self,
        downsample: nn.Module,
        blocks: list[nn.Module],
        dim: int,
        grid: tuple[int, int],
        *,
        last: bool,
        **factory: Any,
    ) -> Stage:
        """A stage with its norm."""
        return NormedStage(downsample, blocks, dim, **factory)

    def make_norm(self, dim: int, **factory: Any) -> nn.Module:
        """None: it is the last stage's."""
        return nn.Identity()


def _init(module: nn.Module) -> None:
    """The published initial weights of a convolution, as which linear layers are published, too; as `init_linear`."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        fan_out = module.weight[:, 0].numel() // getattr(module, "groups", 1)
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        init_own(module)


_CFG = {"first_conv": "stages.0.downsample.proj.conv", "classifier": "head.fc"}


def _host(size: str, dims: Sequence[int], depths: Sequence[int]) -> Host:
    """As many heads as PVTv2 has, of mechanisms that have some."""
    heads = (1, 2, 4 if dims[2] % 5 else 5, 8)
    stages = tuple(StageSize(*row) for row in zip(dims, depths, heads, (8, 8, 4, 4), strict=True))
    return Host(f"van_pyramid_{size}", VisualAttentionNetwork, {"stages": stages}, _CFG, FOUR_MAPS)


add_hosts(
    _host("b0", (32, 64, 160, 256), (3, 3, 5, 2)),
    _host("b1", (64, 128, 320, 512), (2, 2, 4, 2)),
    _host("b2", (64, 128, 320, 512), (3, 3, 12, 3)),
    _host("b3", (64, 128, 320, 512), (3, 5, 27, 3)),
    _host("b4", (64, 128, 320, 512), (3, 6, 40, 3)),
    _host("b5", (96, 192, 480, 768), (3, 3, 24, 3)),
    _host("b6", (96, 192, 384, 768), (6, 6, 90, 6)),
)
