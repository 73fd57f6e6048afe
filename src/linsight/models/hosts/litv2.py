"""The LITv2 host: Pan et al., "Fast Vision Transformers with HiLo Attention", NeurIPS 2022 (arXiv 2205.13213).

Four stages of pre-norm blocks with a depthwise convolution in the MLP and no position table. The first two stages have
no attention: their blocks are the MLP alone (stages with `num_heads` 0; give them heads, and they attend). Patches of 4
pixels with LayerNorm come before the first stage, deformable token merging before each other: a 2x2 convolution of
stride 2 that reads where another such convolution tells it to, also between tokens (deformable convolution v1), with
batch norm and GELU. Every mechanism, of quadratic cost or linear, sees the whole grid.

Any image size: strides round downwards, and a map smaller than its kernel is first padded to it. What is merged depends
on the whole map, so images are not streamed in tiles.
"""

import math
from typing import Any, NoReturn

import torch
from timm.layers import DropPath
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Node, Rename
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, accumulator, copied, full_precision, unflatten

from ..parts.conv_pyramid import as_tokens
from ..parts.convs import ConvEmbed, with_dense_conv
from ..parts.pyramid import PlainPyramid
from ..parts.stages import PreNorm, StageSize
from ..plan import Choice, plan
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer

_DWCONV = Rename("mlp.dwconv.dwconv.", "mlp.dwconv.")


class MovedReads(Node):
    """A map read at other places, as a 2x2 convolution of stride 2 will take it.

    The place of each of the four numbers that an output of that takes is its usual one plus an offset, in tokens, which
    another such convolution tells (zero at the start). Between tokens and at the rim a map is linear, and zero beyond.
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.offset = nn.Conv2d(dim, 8, 2, 2, **factory)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)`, sides of 2 or more, to `(B, C, 2h, 2w)`, h and w the halves of the sides."""
        x = copied(x)
        dtype = accumulator(x.dtype)  # of places, too: in half precision they would be rounded to whole tokens
        size = (x.shape[2], x.shape[3])
        # Of the four places of a kernel, row by row, how far down and how far right.
        moved = unflatten(unflatten(self.offset(x).to(dtype), 1, (2, 4)), 2, (2, 2))  # (B, row, column, 2, h, w)
        moved = moved.permute(0, 4, 1, 5, 2, 3).flatten(3, 4).flatten(1, 2)  # (B, 2h, 2w, 2)
        places = []
        for axis in (1, 0):  # the sampler has columns first, from -1 to 1 over the sides of all tokens
            at = torch.arange(moved.shape[1 + axis], device=x.device).to(dtype)
            at = (at if axis else at[:, None]) + moved[..., axis]
            places.append((2 * at + 1) / size[axis] - 1)
        with full_precision(x):
            out = F.grid_sample(x.to(dtype), torch.stack(places, dim=-1), align_corners=False)
        return out.to(x.dtype)


class DeformableMerge(ConvEmbed):
    """Deformable token merging: a 2x2 convolution of stride 2 of a map read at told places, batch norm, GELU."""

    published = (
        Rename("dconv.conv_offset.", "read.offset."),
        Rename("dconv.", "proj."),
        Rename("norm_layer.", "norm."),
    )

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__(in_dim, dim, 2, 2, norm="none", **factory)
        self.read = MovedReads(in_dim, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, in_dim, H, W)` to tokens `(B, h*w, C)` and their grid."""
        return as_tokens(self.act(self.norm(self.proj(self.read(self.padded(x))))))


class MlpBlock(Node):
    """x + mlp(LN(x)): a block without attention."""

    published = (_DWCONV,)

    def __init__(self, dim: int, mlp: nn.Module, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class LITBlock(PreNorm):
    """Pre-norm attention and MLP."""

    published = (_DWCONV,)


class LITv2(PlainPyramid):
    """The host."""

    attends = False
    published = (
        Rename("patch_embed.", "stages.0.downsample."),
        *(Rename(f"layers.{i}.downsample.", f"stages.{i + 1}.downsample.") for i in range(3)),
        *(Rename(f"layers.{i}.", f"stages.{i}.") for i in range(4)),
        Rename("head.", "head.fc."),
    )

    def __init__(self, *, stages: Any, attention: str = "softmax", **kwargs: Any) -> None:
        sizes = [StageSize(*stage) for stage in stages]
        rows = plan(attention, [size.depth for size in sizes])
        used = {choice.name for size, row in zip(sizes, rows, strict=True) for choice in row if size.num_heads}
        for choice in (choice for row in rows for choice in row):
            if "," in attention and choice.name not in used:
                raise LinsightError(
                    f"attention='{attention}': '{choice.name}' stands only where there is no attention; give these "
                    f"stages heads (stages=), or name it where there are"
                )
        super().__init__(stages=sizes, attention=attention, **kwargs)
        for module in self.modules():
            if isinstance(module, MlpWithDepthwiseConv):
                nn.init.normal_(module.dwconv.weight, std=math.sqrt(2 / 9))  # by its fan out, as published
                nn.init.zeros_(module.dwconv.bias)

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> ConvEmbed | DeformableMerge:
        """Patches, then deformable merging between stages."""
        return DeformableMerge(in_dim, dim, **factory) if i else ConvEmbed(in_dim, dim, 4, 4, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Attention and an MLP with a convolution, or that MLP alone."""
        mlp = with_dense_conv(MlpWithDepthwiseConv(size.dim, int(size.dim * size.mlp_ratio), **factory))
        if not size.num_heads:
            return MlpBlock(size.dim, mlp, drop_path=drop_path, **factory)
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        return LITBlock(size.dim, layer, mlp, drop_path=drop_path, **factory)

    def stream_plan(self) -> NoReturn:
        """Raise: what is merged depends on the whole map."""
        raise CapabilityError(
            "a LITv2 merges tokens wherever its offsets point to, so it has no tiles: take another host, as swin or pvt"
        )


_CFG = {"first_conv": "stages.0.downsample.proj", "classifier": "head.fc"}


def _host(size: str, width: int, third: int) -> Host:
    """Heads are 32 wide, in the stages that have some."""
    stages = tuple(StageSize(width << i, third if i == 2 else 2, (width << i) // 32 if i > 1 else 0) for i in range(4))
    return Host(f"litv2_pyramid_{size}", LITv2, {"stages": stages}, _CFG, FOUR_MAPS)


add_hosts(_host("small", 96, 6), _host("medium", 96, 18), _host("base", 128, 18))
