"""The NAT host: Hassani et al., "Neighborhood Attention Transformer", CVPR 2023 (arXiv 2204.07143).

Four stages of pre-norm blocks without a position table, on request with learned scales of both branches. A 3x3
convolution of stride 2 and a LayerNorm stand before each stage, before the first one a second such convolution with
nothing between the two. Every mechanism, of quadratic cost or linear, sees the whole grid.

Any image size: strides round upwards.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from linsight.attention import Rename
from linsight.ops import Grid

from ..parts.convs import ConvEmbed
from ..parts.pyramid import PlainPyramid
from ..parts.stages import PreNorm, StageSize
from ..plan import Choice, named
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer


class Tokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2, then LayerNorm: images to tokens."""

    stride = 4

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **factory)
        self.second = ConvEmbed(dim // 2, dim, 3, 2, 1, **factory)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the tokens of an image of `size`."""
        return self.second.grid(((size[0] + 1) // 2, (size[1] + 1) // 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """`(B, in_chans, H, W)` to tokens `(B, h*w, C)` and their grid."""
        return self.second(self.first(x))


class ScaledPreNorm(PreNorm):
    """x + gamma1 attn(LN(x)), then x + gamma2 mlp(LN(x)), with a scale for each channel that begins as `scale`."""

    def __init__(
        self, dim: int, *args: Any, scale: float, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(dim, *args, device=device, dtype=dtype, **kwargs)
        self.gamma1 = nn.Parameter(torch.full((dim,), scale, device=device, dtype=dtype))
        self.gamma2 = nn.Parameter(torch.full((dim,), scale, device=device, dtype=dtype))

    def add_attention(self, x: Tensor, grid: Grid) -> Tensor:
        """The first half."""
        return self.add(x, self.gamma1 * self.attn(self.norm1(x), grid))

    def add_mlp(self, x: Tensor, grid: Grid) -> Tensor:
        """The second half."""
        return self.add(x, self.gamma2 * self.mlp(self.norm2(x)))


class NATransformer(PlainPyramid):
    """The host: a `PlainPyramid`, and

    init_values: what the scales of the branches begin with; None: there are none.
    """

    published: ClassVar[tuple[Rename, ...]] = (
        *(
            Rename(f"patch_embed.{theirs}.", f"stages.0.downsample.{ours}.")
            for theirs, ours in (("proj.0", "first"), ("proj.1", "second.proj"), ("norm", "second.norm"))
        ),
        *(Rename(f"levels.{i}.", f"stages.{i}.") for i in range(4)),
        *(
            Rename(f"levels.{i}.downsample.{theirs}.", f"stages.{i + 1}.downsample.{ours}.")
            for i in range(3)
            for theirs, ours in (("reduction", "proj"), ("norm", "norm"))
        ),
        Rename("head.", "head.fc."),
    )

    def __init__(self, *, init_values: float | None = None, **kwargs: Any) -> None:
        self.init_values = init_values
        super().__init__(**kwargs)

    @staticmethod
    def idle(attention: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Arguments that have no effect with these mechanisms, and why: for `create_model` to refuse."""
        if all(kind.kind == "block" for kind in named(attention)):
            return {"init_values": f"'{attention}' brings whole blocks, without these scales"}
        return {}

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> Tokenizer | ConvEmbed:
        """Two convolutions, then one between stages."""
        return ConvEmbed(in_dim, dim, 3, 2, 1, bias=False, **factory) if i else Tokenizer(in_dim, dim, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention and MLP."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio), **factory)
        if self.init_values is None:
            return PreNorm(size.dim, layer, mlp, drop_path=drop_path, **factory)
        return ScaledPreNorm(size.dim, layer, mlp, scale=self.init_values, drop_path=drop_path, **factory)


_CFG = {"first_conv": "stages.0.downsample.first", "classifier": "head.fc"}


def _host(size: str, width: int, third: int, mlp_ratio: float, init_values: float | None = None) -> Host:
    """Heads are 32 wide."""
    widths = [width << i for i in range(4)]
    stages = tuple(StageSize(w, d, w // 32, mlp_ratio) for w, d in zip(widths, (3, 4, third, 5), strict=True))
    args = {"stages": stages, "init_values": init_values}
    return Host(f"nat_pyramid_{size}", NATransformer, args, _CFG, FOUR_MAPS)


add_hosts(
    _host("mini", 64, 6, 3.0),
    _host("tiny", 64, 18, 3.0),
    _host("small", 96, 18, 2.0, 1e-5),
    _host("base", 128, 18, 2.0, 1e-5),
    _host("large", 192, 18, 2.0),
)
