"""The AttNet host: the backbone of "Attentive Convolution" (arXiv 2510.20092).

Four stages of pre-norm blocks with a gated MLP, in which a depthwise convolution stands before the activation. In front
of the first stage stand two convolutions of stride 2 with batch norm and GELU between them, one in front of each other
stage; there is no position table. The head norms the mean of the last map. Every mechanism, of quadratic cost or
linear, sees the whole grid.

Any image size: strides round upwards, and nothing is padded to a multiple.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import LayerNorm2d, NormMlpClassifierHead
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Rename, TokenConv
from linsight.ops import Grid

from ..parts.conv_pyramid import ConvDown
from ..parts.images import check_pool
from ..parts.pyramid import PlainPyramid
from ..parts.stages import PreNorm, StageSize, init_conv
from ..plan import Choice, named
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer


class GatedConvMlp(nn.Module):
    """An MLP on a grid: fc2(norm(GELU(conv3x3(a)) * b)), with a and b the halves of fc1(x)."""

    published: ClassVar[tuple[Rename, ...]] = (
        Rename("fc1.", "fc1.", ones=2),
        Rename("fc2.", "fc2.", ones=2),
        Rename("norm_layer.", "norm."),
    )

    def __init__(self, dim: int, hidden: int, *, norm: bool = False, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, **factory)
        self.dwconv = TokenConv(hidden, **factory)
        self.norm = nn.RMSNorm(hidden, eps=1e-6, **factory) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.norm(F.gelu(self.dwconv(a, (grid.height, grid.width))) * b))


class GatedBlock(PreNorm):
    """Attention and a gated MLP, each branch times a learned scale a channel, if `init_values` says where it starts."""

    published: ClassVar[tuple[Rename, ...]] = (
        Rename("token_mixer.", "attn."),
        Rename("channel_mixer.", "mlp."),
        *(Rename(f"norm_{i}.", f"norm{i}.") for i in (1, 2)),
        *(Rename(f"layer_scale_{i}.gamma", f"gamma_{i}") for i in (1, 2)),
    )

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        init_values: float | None = None,
        drop_path: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(dim, attn, mlp, drop_path=drop_path, eps=1e-6, **factory)
        scales = [None if init_values is None else torch.full((dim,), init_values, **factory) for _ in range(2)]
        self.gamma_1, self.gamma_2 = (None if scale is None else nn.Parameter(scale) for scale in scales)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        x = self.add(x, _scaled(self.attn(self.norm1(x), grid), self.gamma_1))
        return self.add(x, _scaled(self.mlp(self.norm2(x), grid), self.gamma_2))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


class AttNet(PlainPyramid):
    """The host: a `PlainPyramid`, and

    init_values: what the scales of the branches begin with; None for none.
    mlp_norm: an RMSNorm in front of the last layer of the MLPs.
    """

    def __init__(self, *, init_values: float | None = None, mlp_norm: bool = False, **kwargs: Any) -> None:
        self.init_values, self.mlp_norm = init_values, mlp_norm
        super().__init__(**kwargs)
        self.apply(init_conv)

    @staticmethod
    def idle(attention: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Arguments that have no effect with these mechanisms, and why: for `create_model` to refuse."""
        if all(kind.kind == "block" for kind in named(attention)):
            return {
                "init_values": f"'{attention}' brings whole blocks, without these scales",
                "mlp_norm": f"'{attention}' brings whole blocks, with MLPs of their own",
            }
        return {}

    @property
    def published(self) -> tuple[Rename, ...]:
        """Rules for each convolution and block: their published names begin as those of stages do here."""
        return (
            *(Rename(f"downsample_layers.{i}.", f"stages.{i}.downsample.proj.") for i in range(1, len(self.stages))),
            Rename("downsample_layers.0.0.", "stages.0.downsample.proj."),
            *(Rename(f"downsample_layers.0.2.{i}.", f"stages.0.downsample.proj.{3 + i}.") for i in range(2)),
            *(
                Rename(f"stages.{i}.{j}.", f"stages.{i}.blocks.{j}.")
                for i, stage in enumerate(self.stages)
                for j in range(len(stage.blocks))  # type: ignore[arg-type]
            ),
            Rename("norm.", "head.norm."),
            Rename("head.", "head.fc."),
        )

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> ConvDown:
        """Two convolutions to a quarter of the sides, then one to half between stages."""
        sizes = ((dim, 2),) if i else ((dim // 2, 2), (dim, 2))
        return ConvDown(in_dim, sizes, last_act=False, bias=False, act_layer=nn.GELU, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention and a gated MLP."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        hidden = 2 * int(size.dim * size.mlp_ratio) // 3
        mlp = GatedConvMlp(size.dim, hidden, norm=self.mlp_norm, **factory)
        return GatedBlock(size.dim, layer, mlp, init_values=self.init_values, drop_path=drop_path, **factory)

    def make_norm(self, dim: int, **factory: Any) -> nn.Module:
        """None: the head's is behind its mean."""
        return nn.Identity()

    def make_head(
        self, dim: int, num_classes: int, global_pool: str, drop_rate: float, **factory: Any
    ) -> NormMlpClassifierHead:
        """LayerNorm of what is pooled, and a linear layer."""
        norm = partial(LayerNorm2d, eps=1e-5)
        return NormMlpClassifierHead(
            dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm, **factory
        )

    def check_head(self, num_classes: int, global_pool: str) -> None:
        """Raise unless the head, which norms what it pools, can pool so."""
        check_pool(global_pool, ("avg", "max", "avgmax", ""))


_CFG = {"first_conv": "stages.0.downsample.convs.0.conv", "classifier": "head.fc"}


def _host(
    size: str, depths: Sequence[int], dims: Sequence[int], heads: Sequence[int], scaled: bool, normed: bool
) -> Host:
    """Scales begin with 1e-6. Heads, of mechanisms that have some, are not published."""
    stages = tuple(
        StageSize(*row, 8.0 if i < 2 else 4.0) for i, row in enumerate(zip(dims, depths, heads, strict=True))
    )
    args = {"stages": stages, "init_values": 1e-6 if scaled else None, "mlp_norm": normed}
    return Host(f"attnet_pyramid_{size}", AttNet, args, _CFG, FOUR_MAPS)


add_hosts(
    _host("xxs", (2, 2, 4, 2), (32, 64, 128, 240), (2, 4, 8, 15), False, False),
    _host("xs", (2, 2, 7, 2), (40, 80, 160, 320), (1, 2, 4, 8), True, False),
    _host("s", (2, 3, 10, 3), (40, 80, 160, 320), (1, 2, 4, 8), False, False),
    _host("t1", (2, 3, 12, 3), (48, 96, 224, 384), (2, 4, 7, 12), True, True),
    _host("t2", (3, 3, 16, 3), (64, 128, 288, 512), (2, 4, 9, 16), True, True),
    _host("t3", (4, 4, 26, 4), (72, 144, 320, 576), (2, 4, 8, 16), True, True),
    _host("t4", (5, 5, 28, 5), (96, 192, 384, 768), (3, 6, 12, 24), True, True),
)
