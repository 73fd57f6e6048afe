"""The L2ViT host: Zheng, "The Linear Attention Resurrection in Vision Transformer" (arXiv 2501.16182).

Four stages of pre-norm blocks with a position encoding before each half, x + conv3x3(x), and no position table. Before
the first stage stand two convolutions with batch norm and a LayerNorm, before each other a LayerNorm and a convolution
of 2x2. A mechanism of quadratic cost sees windows, which are not shifted and have no position bias; the others see the
whole grid. As published, blocks take turns: `attention="softmax~l2vit_block"`.

Any image size: the first stride rounds upwards, the others downwards, and a map smaller than its kernel is first padded
to it. Grids are padded at the right and bottom to whole windows, and as published, tokens see that padding.
"""

from typing import Any

from timm.layers import Mlp, to_2tuple
from torch import Tensor, nn

from linsight.attention import Rename, mechanism
from linsight.errors import LinsightError
from linsight.ops import Grid, Partition

from ..parts.conv_pyramid import ConvDown
from ..parts.convs import CPE, ConvEmbed
from ..parts.pyramid import PlainPyramid
from ..parts.stages import PreNorm, StageSize, init_conv
from ..plan import Choice
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer


class NormedStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm, ReLU between them, and LayerNorm: images to tokens."""

    stride = 4

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = ConvDown(in_chans, ((dim // 2, 2), (dim, 2)), last_act=False, **factory)
        self.norm = nn.LayerNorm(dim, **factory)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tokens of an image of `size`."""
        return self.proj.grid(size)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, in_chans, H, W)` to tokens `(B, h*w, C)` and their grid."""
        x, grid = self.proj(x)
        return self.norm(x), grid


class WindowBlock(PreNorm):
    """Position encoding, attention, position encoding, MLP; attention in windows of `window`, or on the whole grid."""

    published = (Rename("cpe.0.proj.", "cpe1."), Rename("cpe.1.proj.", "cpe2."))

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        window: tuple[int, int] | None,
        *,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__(dim, attn, mlp, drop_path=drop_path, **factory)
        self.window = window
        self.cpe1 = CPE(dim, **factory)
        self.cpe2 = CPE(dim, **factory)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Move what lies on the whole grid; a window stays as it is."""
        if self.window is None:
            self.attn.set_grid(grid)  # type: ignore[operator]

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        x = self.cpe1(x, grid)
        if self.window is None:
            x = self.add_attention(x, grid)
        else:
            windows = Partition(grid, self.window)
            x = self.add(x, windows.join(self.attn(windows.cut(self.norm1(x)), windows.inner)))
        return self.add_mlp(self.cpe2(x, grid), grid)


class L2ViTransformer(PlainPyramid):
    """The host: a `PlainPyramid`, and

    window_size: the side of the windows of mechanisms of quadratic cost, or height and width.
    """

    def __init__(self, *, window_size: int | tuple[int, int] = 7, **kwargs: Any) -> None:
        self.window_size: tuple[int, int] = to_2tuple(window_size)
        if min(self.window_size) < 1:
            raise LinsightError(f"window_size={window_size}: give the side of a window, 1 or more")
        super().__init__(**kwargs)
        self.apply(init_conv)

    @property
    def published(self) -> tuple[Rename, ...]:
        """Rules for each block: their published names begin as those of stages do here."""
        return (
            *(Rename(f"downsample_layers.{i}.", f"stages.{i}.downsample.") for i in range(len(self.stages))),
            *(
                Rename(f"stages.{i}.{j}.", f"stages.{i}.blocks.{j}.")
                for i, stage in enumerate(self.stages)
                for j in range(len(stage.blocks))  # type: ignore[arg-type]
            ),
            Rename("head.", "head.fc."),
        )

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> NormedStem | ConvEmbed:
        """The stem, then the convolutions between stages."""
        return ConvEmbed(in_dim, dim, 2, 2, norm="ahead", **factory) if i else NormedStem(in_dim, dim, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention and MLP, each behind a position encoding."""
        window = self.window_size if mechanism(choice.name).quadratic else None
        layer = make_layer(choice, size.dim, size.num_heads, grid=window or grid, **factory)
        mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio), **factory)
        return WindowBlock(size.dim, layer, mlp, window, drop_path=drop_path, **factory)


_CFG = {"first_conv": "stages.0.downsample.proj.convs.0.conv", "classifier": "head.fc"}


def _host(size: str, width: int, third: int, heads: int, cfg: dict[str, Any] | None = None, **more: Any) -> Host:
    stages = tuple(StageSize(width * 2**i, third if i == 2 else 2, heads * 2**i) for i in range(4))
    return Host(
        f"l2vit_pyramid_{size}", L2ViTransformer, {"stages": stages, **more}, {**_CFG, **(cfg or {})}, FOUR_MAPS
    )


add_hosts(
    _host("tiny", 96, 6, 3),
    _host("small", 96, 18, 3),
    _host("base", 128, 18, 4),
    _host("base_384", 128, 18, 4, {"input_size": (3, 384, 384)}, window_size=12),
)
