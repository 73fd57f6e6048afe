"""The pyramid that MLLA (arXiv 2405.16605) and ViT^3 (arXiv 2512.01643) share: a stem of five convolutions, three
between stages, and no position table.

Any image size: images are padded with zeros at the right and bottom to a multiple of 4, odd maps between stages to
even ones, as in the published dense backbones. Padding is part of the grid.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers.conv_bn_act import ConvNormAct
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Fusable, Rename, recast
from linsight.ops import Grid, copied, traced

from .pyramid import PlainPyramid


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as what it is, a product with the channels of each place."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A map `(B, C, H, W)` to one that is channels last in memory."""
        return F.linear(input.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


class ConvNorm(ConvNormAct, Fusable):
    """timm's convolution, batch norm and ReLU, by its published names."""

    published = (Rename("norm.", "bn."),)
    conv: nn.Conv2d
    bn: Any  # timm's norm, with the activation behind it

    def __init__(self, *timm_args: Any, **timm_kwargs: Any) -> None:
        super().__init__(*timm_args, **timm_kwargs)
        if self.conv.kernel_size == (1, 1):
            self.conv = recast(self.conv, Pointwise)


class ConvDown(Fusable):
    """3x3 convolutions with batch norm and ReLU, of `(width, stride)` each: a map to tokens. Sides round upwards.

    last_act: also behind the last one.  bias: of the convolutions.
    conv: further arguments of timm's `ConvNormAct`, as another `act_layer`.
    """

    published = tuple(
        Rename(f"proj.{3 * i + place}.", f"convs.{i}.{part}.")
        for i in range(4)
        for place, part in enumerate(("conv", "norm"))
    )

    def __init__(
        self, in_dim: int, sizes: Sequence[tuple[int, int]], *, last_act: bool = True, bias: bool = True, **conv: Any
    ) -> None:
        super().__init__()
        self.strides = [stride for _, stride in sizes]
        self.stride = math.prod(self.strides)
        widths = [in_dim, *(width for width, _ in sizes)]
        acts = [True] * (len(sizes) - 1) + [last_act]
        self.convs = nn.Sequential(
            *(
                ConvNorm(before, width, 3, stride=stride, bias=bias, apply_act=act, **conv)
                for before, (width, stride), act in zip(widths, sizes, acts, strict=False)
            )
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tokens of a map of `size`."""
        for stride in self.strides:
            size = (size[0] + stride - 1) // stride, (size[1] + stride - 1) // stride
        return size

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, in_dim, H, W)` to tokens `(B, h*w, C)` and their grid."""
        return as_tokens(self.convs(x))


class ConvStem(nn.Module):
    """Five convolutions with batch norm: images to tokens of a quarter of their sides.

    3x3 to C/2 of stride 2, two of 3x3, 3x3 to 4C of stride 2, 1x1 to C; ReLU after each but the last. `residual`: the
    two in the middle are a branch that is added, without the second ReLU.
    """

    stride = 4

    def __init__(self, in_chans: int, dim: int, residual: bool, **factory: Any) -> None:
        super().__init__()
        half, wide = dim // 2, 4 * dim
        self.residual = residual
        self.first = ConvNorm(in_chans, half, 3, stride=2, **factory)
        self.middle = nn.Sequential(
            ConvNorm(half, half, 3, **factory), ConvNorm(half, half, 3, apply_act=not residual, **factory)
        )
        self.last = nn.Sequential(
            ConvNorm(half, wide, 3, stride=2, **factory), ConvNorm(wide, dim, 1, apply_act=False, **factory)
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tokens of an image of `size`."""
        return (size[0] + 3) // 4, (size[1] + 3) // 4

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, in_chans, H, W)` to tokens `(B, h*w, C)` and their grid."""
        x = pad_to_multiple(x, 4)
        if not traced(x) and x.device.type == "cpu":
            # Else oneDNN brings each map to a layout of its own, and back.
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.first(x)
        branch = self.middle(x)
        return as_tokens(self.last(x + branch if self.residual else branch))


class ConvMerge(Fusable):
    """A map to tokens of half its sides and C channels: 1x1 to 4C, 3x3 depthwise of stride 2, 1x1.

    ReLU after the first two; batch norm after the last.
    """

    stride = 2
    published = (Rename("conv.0.conv.", "widen."), Rename("conv.1.conv.", "stride2."), Rename("conv.2.", "narrow."))

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        wide = 4 * dim
        self.widen = Pointwise(in_dim, wide, 1, **factory)
        self.act = nn.ReLU()
        self.stride2 = nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=wide, **factory)
        self.narrow = ConvNorm(wide, dim, 1, bias=True, apply_act=False, **factory)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tokens of a map of `size`."""
        return (size[0] + 1) // 2, (size[1] + 1) // 2

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, in_dim, H, W)` to tokens `(B, h*w, C)` and their grid."""
        x = self.act(self.widen(pad_to_multiple(x, 2)))
        return as_tokens(self.narrow(self.act(self.stride2(copied(x)))))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """A map `(B, C, H, W)` with zeros at the right and bottom, where its sides are no multiples."""
    # Not -n % multiple: of this form, sizes after padding and strides are simple terms in a graph.
    low, right = ((n + multiple - 1) // multiple * multiple - n for n in (x.shape[2], x.shape[3]))
    # There, whether there is padding must not be asked: each answer would be a graph of its own.
    return F.pad(x, (0, right, 0, low)) if traced(low) or low or right else x


def as_tokens(x: Tensor) -> tuple[Tensor, Grid]:
    """A map `(B, C, H, W)` as tokens `(B, H*W, C)`, and their grid."""
    return x.flatten(2).transpose(1, 2), Grid(x.shape[2], x.shape[3])


class ConvPyramid(PlainPyramid):
    """A pyramid with these convolutions. A host tells the published names of its stem and makes the blocks."""

    residual_stem: ClassVar[bool]
    published: ClassVar[tuple[Rename, ...]] = (
        *(Rename(f"layers.{i}.", f"stages.{i}.") for i in range(4)),
        *(Rename(f"layers.{i}.downsample.", f"stages.{i + 1}.downsample.") for i in range(3)),
        Rename("head.", "head.fc."),
    )

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> ConvStem | ConvMerge:
        """The stem, then the convolutions between stages."""
        return ConvMerge(in_dim, dim, **factory) if i else ConvStem(in_dim, dim, self.residual_stem, **factory)


def stem_names(*published: str) -> tuple[Rename, ...]:
    """The published names of the five convolutions of the stem, in order."""
    ours = ("first", "middle.0", "middle.1", "last.0", "last.1")
    return tuple(
        Rename(f"patch_embed.{name}.", f"stages.0.downsample.{own}.") for name, own in zip(published, ours, strict=True)
    )
