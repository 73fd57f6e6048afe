"""The PVTv2 host: timm's PyramidVisionTransformerV2 with any mechanism.

Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", CVMJ 2022 (arXiv 2106.13797).
Overlapping patch embeddings, a depthwise convolution in the MLP instead of position tables. Keys and values
of a mechanism of quadratic cost are reduced by a strided convolution (8, 4, 2, 1), or pooled to 7x7 (the
"linear" form, `pvt_v2_b2_li`); the others see every token.

Any image size: strides round upwards, and nothing is padded to a multiple.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import to_2tuple
from timm.models import pvt_v2 as timm_pvt
from timm.models._input import update_model_input_size
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from linsight.attention import Block, recast
from linsight.ops import unflatten

from ..doors import whole_size
from ..parts.convs import with_dense_conv
from ..parts.images import CheckedImages, check_pool, check_pooled
from ..plan import Choice, named, plan
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host, figures
from ..seams import asked_no_weight_decay, in_place_of, make_layer, refuse_unbiased, set_grid
from ..steps import StreamPlan
from ..timm.steps import pvt_v2_plan

_POOLS = ("avg", "")  # of timm's class


class PVTv2Stage(timm_pvt.PyramidVisionTransformerStage):
    """timm's stage, which cannot view the tokens of an empty batch."""

    def forward(self, x: Tensor) -> Tensor:
        """A map `(B, C, H, W)`, or the first one `(B, H, W, C)`, to a map."""
        x = x if self.downsample is None else self.downsample(x)
        size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        return unflatten(self.norm(x), 1, size).permute(0, 3, 1, 2).contiguous()


class PyramidVisionTransformerV2(CheckedImages, timm_pvt.PyramidVisionTransformerV2):
    """timm's class, all its arguments, and

    attention: a mechanism, one a stage, or the first k blocks of a stage (see `plan`).
    attention_options: keyword arguments of that mechanism.
    img_size: what position tables are made for, of mechanisms that have some; any size works.
    sr_ratios: timm's, of the keys of mechanisms of quadratic cost.
    joined: one map gives queries, keys and values where keys are not reduced, as in ViT; else there are two.
    """

    names_of_timm: ClassVar[Mapping[str, str]] = {
        ".attn.sr.": ".attn.reduction.sr.",
        ".attn.norm.": ".attn.reduction.norm.",
    }
    stages: nn.Sequential

    def __init__(
        self,
        *timm_args: Any,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        img_size: int | tuple[int, int] = 224,
        depths: Sequence[int] = (3, 4, 6, 3),
        joined: bool = False,
        **timm_kwargs: Any,
    ) -> None:
        choices = plan(attention, depths, attention_options)
        self.check(attention, timm_kwargs)
        super().__init__(*timm_args, depths=tuple(depths), **timm_kwargs)
        self.put(choices, to_2tuple(img_size), joined)

    @staticmethod
    def check(attention: str, given: Mapping[str, Any]) -> None:
        """Raise for arguments that could not be honoured."""
        refuse_unbiased(attention, given.get("qkv_bias", True))
        check_pool(given.get("global_pool", "avg"), _POOLS)
        check_pooled(given.get("global_pool", "avg"), given.get("num_classes", 1000))

    @staticmethod
    def idle(attention: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Arguments that have no effect with these mechanisms, and why: for `create_model` to refuse."""
        kinds = named(attention)
        found: dict[str, str] = {}
        if not any(kind.quadratic for kind in kinds):
            found["sr_ratios"] = f"'{attention}' reads all keys; those of quadratic cost read a coarser grid"
        if all(kind.kind == "block" for kind in kinds):
            found["linear"] = f"'{attention}' has neither reduced keys nor the host's MLP"
        if not any(kind.kind == "core" and getattr(kind.factory, "projections", "") == "qkv" for kind in kinds):
            found["joined"] = f"'{attention}' has projections of its own"
        return found

    @classmethod
    def adopt(
        cls, model: timm_pvt.PyramidVisionTransformerV2, choices: Sequence[Sequence[Choice]], img_size: tuple[int, int]
    ) -> "PyramidVisionTransformerV2":
        """A model of timm, with its weights, as one of ours: this class adds methods and no state."""
        ours = recast(model, cls)
        ours.put(choices, img_size)
        return ours

    def put(self, choices: Sequence[Sequence[Choice]], img_size: tuple[int, int], joined: bool = False) -> None:
        """The chosen mechanisms in the place of timm's attention, whose weights go on where they fit."""
        self.stages = nn.Sequential(*(recast(stage, PVTv2Stage) for stage in self.stages))
        for (stage, grid), row in zip(self.grids(img_size), choices, strict=False):
            for i, choice in enumerate(row):
                self._put(stage.blocks, i, choice, grid, joined)

    def _put(self, blocks: Any, i: int, choice: Choice, grid: tuple[int, int], joined: bool) -> None:
        old = blocks[i].attn
        reduced = old.sr is not None or old.pool is not None
        with_dense_conv(blocks[i].mlp)
        make = partial(
            make_layer,
            projections="qkv" if joined and not reduced else "q_kv",
            reduction=old.sr.stride[0] if old.sr is not None else 1,
            pool=7 if old.pool is not None else 0,
            grid=grid,
        )
        new = in_place_of(blocks[i], choice, grid, make, self._init_weights)
        if isinstance(new, Block):
            blocks[i] = new
        else:
            blocks[i].attn = new

    @property
    def maps(self) -> int:
        """A map of each stage."""
        return len(self.stages)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, for `num_classes` classes, or none (0), on the mean of the last map, or the map."""
        if global_pool is not None:
            check_pool(global_pool, _POOLS)
        check_pooled(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)

    def grids(self, size: tuple[int, int]) -> Iterator[tuple[Any, tuple[int, int]]]:
        """Each stage and the height and width of its tokens, for images of `size`."""
        for i, stage in enumerate(self.stages):
            halvings = 2 if i == 0 else 1
            for _ in range(halvings):
                size = (size[0] + 1) // 2, (size[1] + 1) // 2
            yield stage, size

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resample position tables, for good, to those of images of `img_size`. Any size works without it, too."""
        if img_size is None:
            return
        height, width = whole_size(img_size)
        for stage, grid in self.grids((height, width)):
            set_grid(stage, grid)
        update_model_input_size(self, (height, width))

    def stream_plan(self) -> StreamPlan:
        """The steps that an image goes through in tiles."""
        return pvt_v2_plan(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the mechanisms want kept from weight decay."""
        return asked_no_weight_decay(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay, by block unless `coarse`."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}


_CFG = {"first_conv": "patch_embed.proj", "classifier": "head"}


def _host(size: str, depths: tuple[int, ...], published: dict[str, Any], **more: Any) -> Host:
    args = {"num_heads": (1, 2, 5, 8), "embed_dims": (64, 128, 320, 512), "depths": depths, **more}
    return Host(f"pvt_v2_{size}", PyramidVisionTransformerV2, args, _CFG, FOUR_MAPS, published)


# timm's sizes; figures with softmax, as published.
add_hosts(
    _host("b0", (2, 2, 2, 2), figures(70.5, 3.67, 0.57), embed_dims=(32, 64, 160, 256)),
    _host("b1", (2, 2, 2, 2), figures(78.7, 14.01, 2.11)),
    _host("b2", (3, 4, 6, 3), figures(82.0, 25.36, 4.03)),
    _host("b2_li", (3, 4, 6, 3), figures(82.1, 22.55, 3.89), linear=True),
    _host("b3", (3, 4, 18, 3), figures(83.1, 45.24, 6.90)),
    _host("b4", (3, 8, 27, 3), figures(83.6, 62.56, 10.10)),
    _host("b5", (3, 6, 40, 3), figures(83.8, 81.96, 11.72), mlp_ratios=(4, 4, 4, 4)),
)
