"""The RAVLT host: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025 (arXiv 2411.07635).

Four stages of pre-norm blocks behind a position encoding, x + conv3x3(x), with learned scales of both branches, a
depthwise convolution in the MLP and no position table; a stem of four convolutions, one between stages, all with batch
norm. The head widens the last map before it takes the mean. Every mechanism, of quadratic cost or linear, sees the
whole grid with all heads; convolution and gate of the papers' layers belong to `rala` and those that follow it.

MAViT (arXiv 2507.00698) is this host with a wider head. `nala_*`, NaLaFormer's (arXiv 2506.21137), have a second
position encoding in front of the MLP.

Any image size: strides round upwards, and nothing is padded to a multiple.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

from linsight.attention import Rename
from linsight.errors import LinsightError
from linsight.ops import Grid

from ..parts.conv_pyramid import ConvDown
from ..parts.convs import CPE, ConvMlp
from ..parts.pyramid import PlainPyramid
from ..parts.stages import PreNorm, Stage, StageSize, init_conv
from ..plan import Choice, named
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from ..seams import make_layer
from ..steps import StreamPlan


class PlainConvMlp(ConvMlp):
    """An MLP on a grid: u = GELU(fc1 x), u = u + conv3x3(u), fc2 u, the convolution depthwise."""

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + H*W, C)`; the shape is kept."""
        return self.fc2(self.dwc(self.act(self.fc1(x)), grid))


class RAVLTBlock(PreNorm):
    """Position encoding, attention, MLP, each branch times a learned scale a channel."""

    published: ClassVar[tuple[Rename, ...]] = (
        Rename("pos.", "cpe."),
        Rename("norm1.norm.", "norm1."),
        Rename("norm2.norm.", "norm2."),
        Rename("ffn.fc1.", "mlp.fc1.", ones=2),
        Rename("ffn.fc2.", "mlp.fc2.", ones=2),
        Rename("ffn.dwconv.", "mlp.dwc."),
        *(Rename(name, name, ones=2) for name in ("gamma_1", "gamma_2")),
    )

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__(dim, attn, mlp, drop_path=drop_path, eps=1e-6, **factory)
        self.cpe = CPE(dim, **factory)
        self.gamma_1 = nn.Parameter(torch.ones(1, dim, **factory))
        self.gamma_2 = nn.Parameter(torch.ones(1, dim, **factory))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + H*W, C)`; the shape is kept."""
        return super().forward(self.cpe(x, grid), grid)

    def add_attention(self, x: Tensor, grid: Grid) -> Tensor:
        """The first half."""
        return self.add(x, self.gamma_1 * self.attn(self.norm1(x), grid))

    def add_mlp(self, x: Tensor, grid: Grid) -> Tensor:
        """The second half."""
        return self.add(x, self.gamma_2 * self.mlp(self.norm2(x), grid))


class NaLaBlock(RAVLTBlock):
    """The block with a second position encoding, in front of the MLP."""

    published = (
        Rename("cpe1.", "cpe."),
        Rename("ffn.", "mlp."),
        *(rule._replace(ones=0) for rule in RAVLTBlock.published if rule.ours.startswith("mlp.")),
        *(rule for rule in RAVLTBlock.published if rule.ours.startswith(("norm", "gamma"))),
    )

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__(dim, attn, mlp, drop_path=drop_path, **factory)
        self.cpe2 = CPE(dim, **factory)

    def add_mlp(self, x: Tensor, grid: Grid) -> Tensor:
        """The second half, behind its position encoding."""
        return super().add_mlp(self.cpe2(x, grid), grid)


class RAVLTStage(Stage):
    """A stage, whose blocks share one rotation in the published models."""

    in_copies: ClassVar[Mapping[str, str]] = {"RoPE.angle": "blocks.{}.attn.core.angle"}


class WideningHead(ClassifierHead):
    """timm's head on a map that is widened first: linear, batch norm, SiLU. Without pooling the map is left alone."""

    def __init__(
        self,
        in_features: int,
        width: int,
        num_classes: int,
        pool_type: str,
        drop_rate: float,
        *,
        bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(width, num_classes, pool_type, drop_rate=drop_rate, **factory)
        self.proj: nn.Module = nn.Linear(in_features, width, bias=bias, **factory)
        self.norm: nn.Module = nn.BatchNorm2d(width, **factory)
        self.act: nn.Module = nn.SiLU()

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """As timm's; `reset_other`: take off what widens, too, so `in_features` are those of the map."""
        if reset_other:
            self.proj, self.norm, self.act = nn.Identity(), nn.Identity(), nn.Identity()
        super().reset(num_classes, pool_type, reset_other, in_features, device, dtype)

    def widened(self, x: Tensor) -> Tensor:
        """A map `(B, C, H, W)` of as many channels as the classifier reads."""
        return self.act(self.norm(self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))

    def classified(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a map that is widened."""
        return super().forward(x, pre_logits)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the last map."""
        return self.classified(self.widened(x) if self.global_pool.pool_type else x, pre_logits)


class RAVLT(PlainPyramid):
    """The host.

    Args:
        init_values: what the scales of the branches begin with, one for all stages, or one a stage.
        projection: channels that the head widens the last map to.
        kwargs: those of `PlainPyramid`.
    """

    head: WideningHead
    block_cls: ClassVar[type[RAVLTBlock]] = RAVLTBlock
    published: ClassVar[tuple[Rename, ...]] = (
        Rename("patch_embed.", "stages.0.downsample."),
        *(Rename(f"layers.{i}.", f"stages.{i}.") for i in range(4)),
        *(Rename(f"layers.{i}.downsample.reduction.", f"stages.{i + 1}.downsample.proj.0.") for i in range(3)),
        *(Rename(f"layers.{i}.downsample.norm.", f"stages.{i + 1}.downsample.proj.1.") for i in range(3)),
        Rename("proj.", "head.proj.", ones=2),
        Rename("norm.", "head.norm."),
        Rename("head.", "head.fc.", ones=2),
    )

    def __init__(self, *, init_values: float | Sequence[float] = 1.0, projection: int = 1024, **kwargs: Any) -> None:
        self.projection = projection
        super().__init__(**kwargs)
        self.apply(init_conv)
        count = len(self.stages)
        values = [init_values] * count if isinstance(init_values, int | float) else list(init_values)
        if len(values) != count:
            raise LinsightError(f"init_values= lists {len(values)} values, but there are {count} stages")
        for stage, value in zip(self.stages, values, strict=True):
            for block in stage.modules():
                if isinstance(block, RAVLTBlock):
                    nn.init.constant_(block.gamma_1, value)
                    nn.init.constant_(block.gamma_2, value)

    @staticmethod
    def idle(attention: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Arguments that have no effect with these mechanisms, and why: for `create_model` to refuse."""
        if all(kind.kind == "block" for kind in named(attention)):
            return {"init_values": f"'{attention}' brings whole blocks, without these scales"}
        return {}

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> ConvDown:
        """Four convolutions to a quarter of the sides, then one to half between stages."""
        half = dim // 2
        sizes = ((dim, 2),) if i else ((half, 2), (half, 1), (half, 1), (dim, 2))
        return ConvDown(in_dim, sizes, last_act=False, act_layer=nn.GELU, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention and an MLP with a convolution, scaled."""
        layer = make_layer(choice, size.dim, size.num_heads, grid=grid, **factory)
        mlp = PlainConvMlp(size.dim, int(size.dim * size.mlp_ratio), **factory)
        return self.block_cls(size.dim, layer, mlp, drop_path=drop_path, **factory)

    def make_stage(
        self, downsample: nn.Module, blocks: list[nn.Module], dim: int, grid: tuple[int, int], *, last: bool, **_: Any
    ) -> nn.Module:
        """A stage of these parts."""
        return RAVLTStage(downsample, blocks)

    def make_norm(self, dim: int, **factory: Any) -> nn.Module:
        """None: it is the head's."""
        return nn.Identity()

    def make_head(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, **factory: Any) -> WideningHead:
        """The head with its projection."""
        return WideningHead(dim, self.projection, num_classes, global_pool, drop_rate, **factory)

    def stream_plan(self) -> StreamPlan:
        """The steps that an image goes through in tiles; the mean is that of widened tokens."""
        return super().stream_plan()._replace(pooled=self._widened_tokens)

    def _widened_tokens(self, x: Tensor) -> Tensor:
        return self.head.widened(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    def head_of_mean(self, prefix: Tensor, mean: Tensor, pre_logits: bool) -> Tensor:
        """Logits, or features, of the mean of the widened map `(B, 1, C)`."""
        return self.head.classified(mean.transpose(1, 2)[..., None], pre_logits)


class NaLaTransformer(RAVLT):
    """The host with NaLaFormer's blocks, and linear layers where RAVLT has 1x1 convolutions."""

    block_cls = NaLaBlock
    published = tuple(rule._replace(ones=0) if rule.published == "proj." else rule for rule in RAVLT.published)


_CFG = {"first_conv": "stages.0.downsample.convs.0.conv", "classifier": "head.fc"}
# Widths, depths, heads.
_SIZES = {
    "xt": ((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12)),
    "t": ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8)),
    "s": ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8)),
    "b": ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8)),
    "l": ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10)),
}
_NALA = {"xt": 3.5, "t": 4.0, "s": 3.5, "b": 4.0, "l": 3.5}  # widths of its MLPs
_BEGIN = {"b": (1.0, 1.0, 1e-6, 1e-6), "l": 1e-6}


def _host(family: str, model_cls: type[RAVLT], size: str, mlp_ratio: float = 3.5) -> Host:
    stages = tuple(StageSize(*row, mlp_ratio) for row in zip(*_SIZES[size], strict=True))
    args = {"stages": stages, "init_values": _BEGIN.get(size, 1.0)}
    return Host(f"{family}_{size}", model_cls, args, _CFG, FOUR_MAPS)


add_hosts(
    *(_host("ravlt", RAVLT, size) for size in ("t", "s", "b", "l")),
    *(_host("nala", NaLaTransformer, size, ratio) for size, ratio in _NALA.items()),
)
