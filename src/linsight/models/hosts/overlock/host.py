"""OverLoCK: Lou and Yu, CVPR 2025 (arXiv 2502.20087), an overview first, then a closer look with it at hand.

Convolutions with large kernels go down to 1/32 of the sides, which is the overview. A quarter as many channels of it,
the context, then join the map of 1/16, which blocks with kernels of each token (ContMix) bring down to 1/32 again;
the context is changed on its way, and at each block the first one is added to it. In training a second head classifies
the overview.

The layers are its own: it takes no mechanism. Its block is to be had for other hosts as `contmix`. Any image size:
strides round upwards. Norms and means over whole maps are no sums that merge, so it does not stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from timm.layers import calculate_drop_path_rates
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from linsight.attention import Rename
from linsight.errors import CapabilityError, LinsightError

from ...doors import whole_size
from ...parts.images import check_format, check_images, in_format
from ...parts.indices import Indices, in_order
from ...parts.pyramid import Pyramid
from ...parts.stages import Stage, as_map, init_conv, init_linear
from ...steps import StreamPlan
from ..ravlt import WideningHead
from .blocks import FirstLook, FocusBlock, FocusStage, OverviewBlock, OverviewHead, SecondLook, down

_AUX = 0.4  # weight of the loss of the second head
_WIDTH = 1024  # of the head
_SLOW = "a graph for all sizes takes too long to make, as maps smaller than a window are enlarged"


class TwoLogits(NamedTuple):
    """Logits in training: of the head, and of the one of the overview."""

    main: Tensor
    overview: Tensor


class OverLoCK(Pyramid):
    """The model.

    Args:
        overview: width, number of blocks, and side of the large kernels of each of the four stages.
        focus: number of blocks and heads of both focus stages; a half of the channels has twice as many kernels.
        img_size: not used, as convolutions take any.
        global_pool: the mean of the last map, its maximum, or both in some way; "" leaves the map.

    In training it gives `TwoLogits`, for `training_loss`; in evaluation the logits of the head.
    """

    aux_head: OverviewHead | None
    unmet: ClassVar[Mapping[str, str]] = {"export": _SLOW, "onnx": _SLOW}
    published: ClassVar[tuple[Rename, ...]] = (
        *(
            Rename(f"{old}.", f"{new}.proj.")
            for old, new in (
                ("patch_embed1", "stages.0.downsample"),
                ("patch_embed2", "stages.1.downsample"),
                ("patch_embed3", "stages.2.overview.0.downsample"),
                ("patch_embed4", "stages.2.overview.1.downsample"),
                ("patch_embedx.x_proj", "stages.3.x_proj"),
                ("patch_embedx.h_proj", "stages.3.h_proj"),
            )
        ),
        *(Rename(f"blocks{i + 1}.", f"stages.{i}.blocks.") for i in range(2)),
        *(Rename(f"blocks{i + 3}.", f"stages.2.overview.{i}.blocks.") for i in range(2)),
        Rename("high_level_proj.", "stages.2.context.", ones=2),
        *(Rename(f"sub_blocks{i + 1}.", f"stages.{i}.blocks.") for i in (2, 3)),
        Rename("head.0.", "head.proj.", ones=2),
        Rename("head.1.", "head.norm."),
        Rename("head.4.", "head.fc.", ones=2),
    )

    def __init__(
        self,
        *,
        overview: Sequence[tuple[int, int, int]],
        focus: Sequence[tuple[int, int]],
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes)
        self.check_head(num_classes, global_pool)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dims, depths, kernels = zip(*overview, strict=True)
        rates = iter(
            calculate_drop_path_rates(drop_path_rate, [*depths, *(depth for depth, _ in focus)], stagewise=True)
        )
        context, last = dims[3] // 4, dims[3] + dims[3] // 4
        stages = [
            Stage(
                down(before, dim, stem=not i, **factory),
                [
                    OverviewBlock(dim, kernel, mlp_ratio=4.0, scaled=i > 1, drop_path=rate, **factory)
                    for rate in next(rates)
                ],
            )
            for i, (before, dim, kernel) in enumerate(zip((in_chans, *dims), dims, kernels, strict=False))
        ]
        looks = [
            [
                FocusBlock(dim, context, heads, kernel, first=not i and not j, drop_path=rate, **factory)
                for j, rate in enumerate(next(rates))
            ]
            for i, ((_, heads), dim, kernel) in enumerate(zip(focus, dims[2:], kernels[2:], strict=True))
        ]
        self.stem = nn.Identity()
        downs = (down(dims[2], dims[3], **factory), down(context, context, **factory))
        self.stages = nn.ModuleList(
            [*stages[:2], FirstLook(stages[2:], dims[3], context, looks[0], **factory), SecondLook(*downs, looks[1])]
        )
        widths = (dims[0], dims[1], dims[2] + context, last)
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, width in enumerate(widths)
        ]
        self.num_features, self.overview_width = last, dims[3]
        self.norm = nn.Identity()
        self.head = WideningHead(last, _WIDTH, num_classes, global_pool, drop_rate, bias=False, **factory)
        self.head_hidden_size = self.head.num_features
        self.aux_head = OverviewHead(dims[3], num_classes, **factory) if num_classes else None
        self.apply(init_linear)
        self.apply(init_conv)

    def walk(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The map behind each stage in turn, and the tokens of the overview where it was made."""
        strict = torch.compiler.is_dynamo_compiling()  # which does not tell whether a size is a symbol
        if torch.compiler.is_exporting() and (strict or isinstance(x.shape[2], torch.SymInt)):
            raise LinsightError(f"no graph of OverLoCK for images of any size: {_SLOW}; export one of a fixed size")
        for stage in self.stages[:2]:
            x = stage(x)
            yield x, None
        if len(self.stages) > 2:
            found, seen = self.stages[2](x)
            yield as_map(torch.cat([found.x, found.h], dim=-1), found.grid), seen
            if len(self.stages) > 3:
                yield self.stages[3](found), None

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> the last map `(B, C + c, h, w)`."""
        check_images(self, x)
        *_, (x, _) = self.walk(x)
        return x

    def forward(self, x: Tensor) -> Any:
        """Images to logits `(B, num_classes)`; in training to those of both heads."""
        check_images(self, x)
        *_, (_, seen), (last, _) = self.walk(x)
        logits = self.forward_head(last)
        if not self.training or self.aux_head is None:
            return logits
        return TwoLogits(logits, self.aux_head(seen))

    def training_loss(self, outputs: Any, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The loss of what `forward` gives in training: 0.4 of that of the overview is added.

        criterion: of logits and targets, soft ones under mixup too.
        """
        if not isinstance(outputs, TwoLogits):
            return criterion(outputs, targets)
        return criterion(outputs.main, targets) + _AUX * criterion(outputs.overview, targets)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's: the maps behind the stages `indices`, and the final features; there is no norm."""
        check_format(output_fmt)
        take = in_order(indices, len(self.stages))
        check_images(self, x)
        maps = []
        for i, (x, _) in enumerate(self.walk(x)):  # noqa: B020 - the last map is the final one
            if i in take:
                maps.append(in_format(x, output_fmt))
            if stop_early and i == take[-1]:
                break
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps `indices` do not need; their places, in order."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if not self.num_classes:
            self.aux_head = None
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads, for `num_classes` classes, or none (0), on the last map pooled in another way."""
        super().reset_classifier(num_classes, global_pool)
        like = next(self.parameters())
        factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.aux_head = OverviewHead(self.overview_width, num_classes, **factory) if num_classes else None

    def get_classifier(self) -> Any:
        """The last linear layers of both heads."""
        return (self.head.fc, *(() if self.aux_head is None else (self.aux_head.fc,)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        for part in self.stages.modules():
            if isinstance(part, Stage | FocusStage):
                part.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Note the size of images that the model is for; it takes any."""
        if img_size is not None:
            update_model_input_size(self, whole_size(img_size))

    def stream_plan(self) -> StreamPlan:
        """Refused: see the module."""
        raise CapabilityError(
            "OverLoCK has norms and means over whole maps, so it does not stream: take a host, as van_b0"
        )
