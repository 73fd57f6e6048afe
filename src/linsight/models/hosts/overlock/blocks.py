"""The blocks and stages of OverLoCK, on tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Node, Rename, TokenConv
from linsight.attention.parts.context import (
    Affine,
    ContextMixer,
    GlobalResponseNorm,
    GRNMlp,
    RepConv,
    ResidualConv,
    SqueezeExcite,
    mixer_names,
    mlp_names,
    normed,
    resized,
)
from linsight.ops import Grid

from ...parts.conv_pyramid import ConvDown
from ...parts.stages import Stage, as_map

_SMALL = 5  # side of the small windows


class OverviewBlock(Node):
    """x <- x + conv3x3(x), then s(x) + MLP(SE(BN RepConv(LN x))), s a factor and a bias for each channel, or none."""

    published = (
        Rename("proj.0.", "norm."),
        Rename("proj.1.", "lepe."),
        Rename("proj.2.", "lepe_norm."),
        Rename("proj.3.", "se."),
        *mlp_names("proj", 4),
    )

    def __init__(
        self, dim: int, kernel_size: int, *, mlp_ratio: float, scaled: bool, drop_path: float, **factory: Any
    ) -> None:
        super().__init__()
        self.dwconv = ResidualConv(dim, **factory)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.lepe = RepConv(dim, kernel_size, **factory)
        self.lepe_norm = nn.BatchNorm1d(dim, **factory)
        self.se = SqueezeExcite(dim, **factory)
        self.mlp = GRNMlp(dim, int(dim * mlp_ratio), **factory)
        self.ls = Affine(dim, 1.0, **factory) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        size = (grid.height, grid.width)
        x = self.dwconv(x, size)
        local = normed(self.lepe_norm, self.lepe(self.norm(x), size))
        return self.ls(x) + self.drop_path(self.mlp(self.se(local), size))


class FocusBlock(nn.Module):
    """A block on a map and a context that joins it: kernels of each token come of both.

    first: the context is as it came, else the one that came is added to it, each times a factor for each channel.
    """

    published = (
        Rename("fusion.0.", "fuse_conv."),
        Rename("fusion.1.", "fuse_norm."),
        Rename("fusion.3.", "fuse_linear.", ones=2),
        Rename("fusion.4.", "fuse_grn."),
        *mixer_names("dyconv_proj"),
    )

    def __init__(
        self,
        dim: int,
        context: int,
        num_heads: int,
        kernel_size: int,
        *,
        mlp_ratio: float = 3.0,
        first: bool = False,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        both = dim + context
        self.widths = [dim, context]
        self.x_scale, self.h_scale = (None if first else Affine(context, 1.0, **factory) for _ in range(2))
        self.dwconv1 = ResidualConv(both, **factory)
        self.norm1 = nn.LayerNorm(both, eps=1e-6, **factory)
        self.fuse_conv = TokenConv(both, **factory)
        self.fuse_norm = nn.BatchNorm1d(both, **factory)
        self.fuse_linear = nn.Linear(both, dim, **factory)
        self.fuse_grn = GlobalResponseNorm(dim, **factory)
        self.mixer = ContextMixer(dim, context, both, num_heads, kernel_size, small_size=_SMALL, **factory)
        self.dwconv2 = ResidualConv(both, **factory)
        self.norm2 = nn.LayerNorm(both, eps=1e-6, **factory)
        self.mlp = GRNMlp(both, int(dim * mlp_ratio), **factory)
        self.ls1, self.ls2 = (Affine(both, 1.0, **factory) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, h: Tensor, start: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Map `(B, H*W, C)` and context `(B, H*W, c)`, of the block before and of the start, to the next ones."""
        size = (grid.height, grid.width)
        if self.x_scale is not None and self.h_scale is not None:
            h = self.x_scale(h) + self.h_scale(start)
        x = self.dwconv1(torch.cat([x, h], dim=-1), size)
        f = self.norm1(x)
        query, key = f.split(self.widths, dim=-1)
        u = F.gelu(normed(self.fuse_norm, self.fuse_conv(f, size)))
        u = self.fuse_grn(self.fuse_linear(u))
        x = self.ls1(x) + self.drop_path(self.mixer(u, query, key, size))
        x = self.dwconv2(x, size)
        x = self.ls2(x) + self.drop_path(self.mlp(self.norm2(x), size))
        x, h = x.split(self.widths, dim=-1)
        return x, h


class Context(NamedTuple):
    """The tokens of a map, the context beside it, both of `grid`; the context as it was first, of the grid `under`."""

    x: Tensor
    h: Tensor
    grid: Grid
    start: Tensor
    under: Grid


class FocusStage(nn.Module):
    """Blocks on a map and its context. Hosts make what comes before."""

    def __init__(self, blocks: Sequence[FocusBlock]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)

    def run(self, x: Tensor, h: Tensor, start: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Map and context behind all blocks; start: the context as it came, of the same grid."""
        for block in self.blocks:
            x, h = checkpoint(block, x, h, start, grid) if self.grad_checkpointing else block(x, h, start, grid)
        return x, h


class FirstLook(FocusStage):
    """The overview of a map of 1/8, and the focus stage of 1/16."""

    def __init__(
        self, overview: Sequence[Stage], dim: int, context: int, blocks: Sequence[FocusBlock], **factory: Any
    ) -> None:
        super().__init__(blocks)
        self.overview = nn.ModuleList(overview)
        self.context = nn.Linear(dim, context, **factory)

    def forward(self, x: Tensor) -> tuple[Context, Tensor]:
        """A map `(B, C, H, W)` to what the next stage goes on with, and the tokens of the overview."""
        middle, low = self.overview
        x, grid = middle.tokens(x)  # type: ignore[operator]
        seen, under = low.tokens(as_map(x, grid))  # type: ignore[operator]
        start = self.context(seen)
        h = resized(start, under[:2], grid[:2])
        x, h = self.run(x, h, h, grid)
        return Context(x, h, grid, start, under), seen


class SecondLook(FocusStage):
    """The focus stage of 1/32."""

    def __init__(self, x_proj: ConvDown, h_proj: ConvDown, blocks: Sequence[FocusBlock]) -> None:
        super().__init__(blocks)
        self.x_proj, self.h_proj = x_proj, h_proj

    def forward(self, found: Context) -> Tensor:
        """To the last map `(B, C + c, h, w)`."""
        x, grid = self.x_proj(as_map(found.x, found.grid))
        h, _ = self.h_proj(as_map(found.h, found.grid))
        return as_map(torch.cat(self.run(x, h, found.start, grid), dim=-1), grid)


def down(in_dim: int, dim: int, *, stem: bool = False, **factory: Any) -> ConvDown:
    """A convolution to half of the sides and batch norm; as the stem, four of them to a quarter."""
    half = dim // 2
    sizes = ((half, 2), (half, 1), (dim, 2), (dim, 1)) if stem else ((dim, 2),)
    return ConvDown(in_dim, sizes, last_act=False, bias=False, act_layer=nn.GELU, **factory)


class OverviewHead(nn.Module):
    """Batch norm, the mean, a linear layer: logits of the overview."""

    published = (Rename("0.", "norm."), Rename("2.", "fc.", ones=2))

    def __init__(self, dim: int, num_classes: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, **factory)
        self.fc = nn.Linear(dim, num_classes, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C)` to `(B, num_classes)`."""
        return self.fc(normed(self.norm, x).mean(dim=1))
