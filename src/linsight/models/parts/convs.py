"""Convolutional parts that hosts share."""

from typing import Any, Literal

from timm.layers import Mlp, PatchEmbed, to_2tuple
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Fusable, TokenConv, recast
from linsight.ops import (
    Grid,
    Layout,
    LayoutLike,
    as_layout,
    at_least,
    copied,
    each_grid,
    mask_tokens,
    pad_prefix,
    to_multiple,
    traced,
)

from ..doors import check_whole, whole_size


class CPE(TokenConv, Fusable):
    """Conditional position encoding, x + conv3x3(x), depthwise, on tokens; prefix tokens pass by.

    Chu et al., "Conditional Positional Encodings for Vision Transformers", ICLR 2023 (arXiv 2102.10882).
    """

    def forward(self, x: Tensor, layout: LayoutLike) -> Tensor:  # type: ignore[override]
        """`(B, P + H*W, C)`; the shape is kept. Padding is as what is outside of the grid."""
        layout = as_layout(layout)
        return x + each_grid(self._local, mask_tokens(x, layout.keep(x.device)), layout)

    def _local(self, x: Tensor, layout: Layout) -> Tensor:
        grid = layout.grid
        return pad_prefix(super().forward(x[:, grid.prefix :], (grid.height, grid.width)), grid.prefix)


class DenseConv(nn.Conv2d):
    """A convolution that in a graph that leaves takes a dense copy of its map."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(copied(input), weight, bias)


def with_dense_conv(mlp: MlpWithDepthwiseConv) -> MlpWithDepthwiseConv:
    """timm's MLP, whose convolution sees tokens as they lie, with a `DenseConv`."""
    mlp.dwconv = recast(mlp.dwconv, DenseConv)
    return mlp


class WholePatches(PatchEmbed):
    """timm's patch embedding of any size, padded to whole patches, without its checks, which make a graph for each."""

    border = 0  # patches of zeros on each side of an image

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, ceil(H / p), ceil(W / p), C)`."""
        down, right = self.patch_size
        high, wide = to_multiple(x.shape[2], down), to_multiple(x.shape[3], right)
        x = self.proj(F.pad(x, (0, wide - x.shape[3], 0, high - x.shape[2])))
        return self.norm(x.permute(0, 2, 3, 1))

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """timm's, which may make another convolution."""
        if patch_size is not None:
            check_whole(patch_size=patch_size if not isinstance(patch_size, tuple | list) else min(patch_size))
        super().set_input_size(
            None if img_size is None else whole_size(img_size), None if patch_size is None else to_2tuple(patch_size)
        )


class BorderedPatches(WholePatches):
    """Whole patches, with `border` more of zeros on each side of an image, which are tokens as all others."""

    def __init__(self, *timm_args: Any, border: int, **timm_kwargs: Any) -> None:
        self.border = border  # which the size of the grid depends on
        super().__init__(*timm_args, **timm_kwargs)
        self._widen()

    def _widen(self) -> None:
        self.proj.padding = (self.border * self.patch_size[0], self.border * self.patch_size[1])

    def _init_img_size(self, img_size: int | tuple[int, int]) -> Any:
        size, grid, _ = super()._init_img_size(img_size)
        assert grid is not None
        high, wide = (side + 2 * self.border for side in grid)
        return size, (high, wide), high * wide

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As that of `WholePatches`."""
        super().set_input_size(*args, **kwargs)
        self._widen()

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the grid of an image of `img_size`."""
        high, wide = super().dynamic_feat_size(img_size)
        return high + 2 * self.border, wide + 2 * self.border


class ConvEmbed(nn.Module):
    """A strided convolution, and LayerNorm behind or ahead of it, or none: images or maps `(B, C, H, W)` to tokens.

    Floors as convolutions do; a map smaller than the kernel is first padded to it with zeros. `whole` pads to whole
    strides, so that none of a map is left out.
    """

    whole = False

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel: int,
        stride: int,
        padding: int = 0,
        *,
        norm: Literal["behind", "ahead", "none"] = "behind",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        # Not read off the convolution, in whose place others put modules of their own, as LoRA does.
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, padding, bias=bias, device=device, dtype=dtype)
        self.ahead = norm == "ahead"
        width = in_dim if self.ahead else dim
        self.norm: nn.Module = nn.Identity() if norm == "none" else nn.LayerNorm(width, device=device, dtype=dtype)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tokens of a map of `size`."""
        sides = (to_multiple(side, self.stride) if self.whole else side for side in size)
        padded = (max(side + 2 * self.padding, self.kernel) for side in sides)
        height, width = ((side - self.kernel) // self.stride + 1 for side in padded)
        return height, width

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, H*W, C)` and its grid."""
        if self.ahead:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.proj(self.padded(x))
        tokens = x.flatten(2).transpose(1, 2)
        return tokens if self.ahead else self.norm(tokens), Grid(x.shape[2], x.shape[3])

    def padded(self, x: Tensor) -> Tensor:
        """A map with the zeros at the right and bottom that the convolution is to see."""
        least = self.kernel - 2 * self.padding
        low, wide = least - x.shape[2], least - x.shape[3]
        if self.whole:
            low, wide = (to_multiple(side, self.stride) - side for side in x.shape[2:])
        if traced(low) or low > 0 or wide > 0:
            x = F.pad(x, (0, at_least(wide, 0), 0, at_least(low, 0)))
        return x


class ConvMlp(Mlp):
    """An MLP on a grid: u = GELU(fc1 x), u = GELU(u + conv3x3(u)), fc2 u, the convolution depthwise."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__(dim, hidden, **factory)
        self.dwc = CPE(hidden, **factory)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + H*W, C)`; the shape is kept."""
        return self.fc2(self.act(self.dwc(self.act(self.fc1(x)), grid)))
