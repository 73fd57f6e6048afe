"""The compact host: a small hierarchical backbone for small images, trainable on a CPU in minutes.

Convolutions where the grid is fine, where any attention costs more than it brings; then stages of
pre-norm blocks, each behind a 3x3 convolution of stride 2: x + attn(LN(x)), x + mlp(LN(x)), with a
3x3 depthwise convolution inside the MLP in place of a position table (PVTv2, arXiv 2106.13797).
Any image size: strides floor upwards, nothing is padded to a multiple.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, NormMlpClassifierHead, calculate_drop_path_rates, trunc_normal_
from timm.layers.conv_bn_act import ConvNormAct
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from linsight.attention import create_attention, create_block, is_block
from linsight.errors import LinsightError
from linsight.ops import Grid

from ._plan import Choice, plan
from ._seams import asked_no_weight_decay


class Stage(NamedTuple):
    """A stage of the host: its width, blocks and heads."""

    dim: int
    depth: int
    num_heads: int


class CompactBlock(nn.Module):
    """Pre-norm attention and convolutional MLP on tokens `(B, H*W, C)`."""

    def __init__(self, stage: Stage, choice: Choice, *, mlp_ratio: float, drop_path: float, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(stage.dim, **factory)
        self.attn = create_attention(choice.name, stage.dim, stage.num_heads, **factory, **choice.options)
        self.norm2 = nn.LayerNorm(stage.dim, **factory)
        self.mlp = MlpWithDepthwiseConv(stage.dim, int(stage.dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """The shape is kept."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x), [grid.height, grid.width]))


def _block(stage: Stage, choice: Choice, **arguments: Any) -> nn.Module:
    if is_block(choice.name):
        return create_block(choice.name, stage.dim, stage.num_heads, **arguments, **choice.options)
    return CompactBlock(stage, choice, **arguments)


class CompactStage(nn.Module):
    """A downsampling convolution and its blocks, maps in and out."""

    def __init__(
        self,
        in_dim: int,
        stage: Stage,
        choices: Sequence[Choice],
        *,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        **factory: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = ConvNormAct(in_dim, stage.dim, 3, stride=2, apply_act=False, **factory)
        self.blocks = nn.ModuleList(
            _block(stage, choice, mlp_ratio=mlp_ratio, drop_path=rate, **factory)
            for choice, rate in zip(choices, drop_paths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, dim, ceil(H / 2), ceil(W / 2))`."""
        x = self.downsample(x)
        grid = Grid(x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x.transpose(1, 2).unflatten(2, (grid.height, grid.width))


class Compact(nn.Module):
    """The host.

    Args:
        stem: `(width, stride)` of each 3x3 convolution at the start.
        stages: width, depth and heads of each stage, which halves the grid; plain tuples do.
        attention: a mechanism, one a stage, or the first k blocks of a stage (see `plan`).
        img_size: accepted as every timm model does; the host has nothing that depends on it.
    """

    def __init__(
        self,
        *,
        stem: Sequence[tuple[int, int]],
        stages: Sequence[Stage],
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.output_fmt = in_chans, num_classes, "NCHW"
        stages = [Stage(*stage) for stage in stages]
        depths = [stage.depth for stage in stages]
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        choices = plan(attention, depths, attention_options)
        widths = [in_chans, *(width for width, _ in stem)]
        self.stem = nn.Sequential(
            *(
                ConvNormAct(before, width, 3, stride=stride, act_layer=nn.GELU, **factory)
                for before, (width, stride) in zip(widths, stem, strict=False)
            )
        )
        reduction = 1
        for _, stride in stem:
            reduction *= stride
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        width = widths[-1]
        for i, stage in enumerate(stages):
            self.stages.append(
                CompactStage(width, stage, choices[i], mlp_ratio=mlp_ratio, drop_paths=rates[i], **factory)
            )
            width, reduction = stage.dim, reduction * 2
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{i}"})
        self.num_features = self.head_hidden_size = width
        self.head = NormMlpClassifierHead(width, num_classes, drop_rate=drop_rate, **factory)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """What the mechanisms ask for."""
        return asked_no_weight_decay(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, for `num_classes` classes; 0 for none."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def set_input_size(self, img_size: tuple[int, int] | None = None, **_: Any) -> None:
        """Nothing to do: no parameter depends on the image size."""

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> the last map `(B, C, h, w)`."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map, LayerNorm, linear."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's: the maps after the stages `indices`, and the last one."""
        if output_fmt != "NCHW":
            raise LinsightError(f"output_fmt='{output_fmt}': this host gives maps, NCHW")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps `indices` do not need."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take
