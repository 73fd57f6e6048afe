"""The Flowformer host: Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows", ICML 2022.

The vision model of arXiv 2202.06258, by its published code: four stages of pre-norm blocks, each behind a convolution
whose kernel is its stride (4, 2, 2, 2), without a norm. Positions are told by a learned table, in the first stage
alone, and the MLP's branch, not that of attention, is scaled by a learned factor for each channel, 1e-5 at the start.
All stages have as many heads. Every mechanism, of quadratic cost or linear, sees the whole grid.

Any image size: strides round downwards, a map smaller than its kernel is first padded to it, and the table is
resampled (bilinear) to any other grid; the published code takes images of one size.
"""

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from linsight.attention import Rename
from linsight.ops import Grid

from ..parts.convs import ConvEmbed
from ..parts.pyramid import PlainPyramid
from ..parts.stages import PreNorm, Stage, StageSize
from ..plan import Choice
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer
from .pvt import PVTStage

_START = 1e-5  # of the factor


class ScaledMlpBlock(PreNorm):
    """x + attn(LN(x)), then x + gamma mlp(LN(x))."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__(dim, attn, mlp, drop_path=drop_path, eps=1e-6, **factory)
        self.gamma = nn.Parameter(torch.full((dim,), _START, **factory))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + H*W, C)`; the shape is kept."""
        x = self.add_attention(x, grid)
        return self.add(x, self.gamma * self.mlp(self.norm2(x)))


class FlowTransformer(PlainPyramid):
    """The host."""

    published = (
        Rename("pos_embed", "stages.0.pos_embed"),
        *(Rename(f"patch_embed.{i}.", f"stages.{i}.downsample.") for i in range(4)),
        *(Rename(f"blocks.{i}.", f"stages.{i}.blocks.") for i in range(4)),
        Rename("head.", "head.fc."),
    )

    def make_norm(self, dim: int, **factory: Any) -> nn.Module:
        """LayerNorm."""
        return nn.LayerNorm(dim, eps=1e-6, **factory)

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> ConvEmbed:
        """A convolution whose kernel is its stride."""
        stride = 2 if i else 4
        return ConvEmbed(in_dim, dim, stride, stride, norm="none", **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention, and an MLP whose branch is scaled."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio), **factory)
        return ScaledMlpBlock(size.dim, layer, mlp, drop_path=drop_path, **factory)

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
        """A stage, the first one with a position table."""
        if len(self.stages):
            return Stage(downsample, blocks)
        return PVTStage(downsample, blocks, dim=dim, grid=grid, class_token=False, **factory)


_CFG = {"first_conv": "stages.0.downsample.proj", "classifier": "head.fc"}
_STAGES = tuple(StageSize(96 * 2**i, depth, 12) for i, depth in enumerate((3, 3, 10, 3)))

add_hosts(Host("flow_pyramid", FlowTransformer, {"stages": _STAGES}, _CFG, FOUR_MAPS))
