"""The compact host: a small hierarchical backbone for small images, trainable on a CPU in minutes.

Convolutions where the grid is fine, where any attention costs more than it brings; then stages of
pre-norm blocks, each behind a 3x3 convolution of stride 2: x + attn(LN(x)), x + mlp(LN(x)), with a
3x3 depthwise convolution inside the MLP in place of a position table (PVTv2, arXiv 2106.13797).
Every mechanism, of quadratic cost or linear, sees the whole grid.

Any image size: strides round upwards, and nothing is padded to a multiple.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timm.layers import NormMlpClassifierHead, to_2tuple
from timm.layers.conv_bn_act import ConvNormAct
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Grid

from ..parts.convs import with_dense_conv
from ..parts.dense import Features
from ..parts.images import check_pool
from ..parts.pyramid import Pyramid
from ..parts.stages import PreNorm, StageSize, init_linear
from ..plan import Choice
from ..registry import add_hosts
from ..rows import Host
from ..seams import make_layer


class Down(ConvNormAct):
    """A 3x3 convolution of stride 2 and batch norm: a map to tokens of half its sides, rounded up."""

    stride = 2

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__(in_dim, dim, 3, stride=2, apply_act=False, **factory)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tokens of a map of `size`."""
        return (size[0] + 1) // 2, (size[1] + 1) // 2

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, H*W, C)` and its grid."""
        x = super().forward(x)
        return x.flatten(2).transpose(1, 2), Grid(x.shape[2], x.shape[3])


class Compact(Pyramid):
    """The host.

    Args:
        stem: `(width, stride)` of each 3x3 convolution at the start.
        stages: width, depth and heads of each stage, which halves the grid; plain tuples do.
        attention: a mechanism, one a stage, or the first k blocks of a stage (see `plan`).
        img_size: what position tables are made for, of mechanisms that have some.
        global_pool: the mean of the last map, its maximum, or the mean of both; "" leaves the map.
        factory: `device` and `dtype`.
    """

    def __init__(
        self,
        *,
        stem: Sequence[tuple[int, int]],
        stages: Sequence[StageSize],
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 32,
        mlp_ratio: float = 2.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(in_chans, num_classes, **factory)
        self.check_head(num_classes, global_pool)
        if any(StageSize(*stage).mlp_ratio != StageSize._field_defaults["mlp_ratio"] for stage in stages):
            raise LinsightError("the MLP ratio of a stage has no effect: pass mlp_ratio=, one for all stages")
        sizes = [StageSize(*stage)._replace(mlp_ratio=mlp_ratio) for stage in stages]
        widths = [in_chans, *(width for width, _ in stem)]
        self.stem = nn.Sequential(
            *(
                ConvNormAct(before, width, 3, stride=stride, act_layer=nn.GELU, **factory)
                for before, (width, stride) in zip(widths, stem, strict=False)
            )
        )
        self.grow(
            sizes,
            widths[-1],
            self._after_stem(to_2tuple(img_size)),
            attention=attention,
            attention_options=attention_options,
            drop_path_rate=drop_path_rate,
            reduction=math.prod(stride for _, stride in stem),
            **factory,
        )
        self.norm = nn.Identity()
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **factory
        )
        self.apply(init_linear)

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> Down:
        """A convolution of stride 2."""
        return Down(in_dim, dim, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention and an MLP with a convolution."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        mlp = with_dense_conv(MlpWithDepthwiseConv(size.dim, int(size.dim * size.mlp_ratio), **factory))
        return PreNorm(size.dim, layer, mlp, drop_path=drop_path, **factory)

    def check_head(self, num_classes: int, global_pool: str) -> None:
        """Raise unless the head, which norms what it pools, can pool so."""
        check_pool(global_pool, ("avg", "max", "avgmax", ""))

    def _after_stem(self, size: tuple[int, int]) -> tuple[int, int]:
        for conv in self.stem:  # type: ignore[attr-defined]
            stride = conv.conv.stride[0]
            size = (size[0] + stride - 1) // stride, (size[1] + stride - 1) // stride
        return size

    def grids(self, size: tuple[int, int]) -> Iterator[tuple[nn.Module, tuple[int, int]]]:
        """Each stage and the height and width of its tokens, for images of `size`, which the stem reduces first."""
        return super().grids(self._after_stem(size))


_CFG = {
    "first_conv": "stem.0.conv",
    "classifier": "head.fc",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "interpolation": "bilinear",
}
_FEATURES = {"out_indices": (0, 1), "feature_cls": Features}

add_hosts(
    Host(
        "compact_pico",
        Compact,
        {"stem": ((32, 1),), "stages": (StageSize(64, 2, 2), StageSize(96, 1, 3))},
        {**_CFG, "input_size": (3, 8, 8)},
        _FEATURES,
        stride=4,
    ),
    Host(
        "compact_nano",
        Compact,
        {"stem": ((24, 1), (48, 2)), "stages": (StageSize(96, 2, 3), StageSize(192, 2, 6))},
        {**_CFG, "input_size": (3, 32, 32)},
        _FEATURES,
        stride=8,
    ),
    Host(
        "compact_tiny",
        Compact,
        {"stem": ((32, 1), (64, 2), (64, 1)), "stages": (StageSize(128, 2, 4), StageSize(256, 2, 8))},
        {**_CFG, "input_size": (3, 32, 32)},
        _FEATURES,
        stride=8,
    ),
)
