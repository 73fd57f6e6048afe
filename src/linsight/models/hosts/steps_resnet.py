"""Steps-ResNet: timm's ResNet, whose stages are split by channels into steps behind their first block.

"Step by Step Network", arXiv 2511.14329. A narrow step works on the first channels of a stage's maps and leaves
the others as they are, for later ones; the blocks are timm's, and so is all else. Blocks of the whole width lie
in their stage as they do in timm's class, so with one step a stage the model and its weights are timm's.

The first block of a stage, which may stride, has the whole width and belongs to no step. A published row such as
"512 x 0" means that the last slice is first seen behind the stage.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from timm.models import resnet as timm_resnet
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from linsight.errors import LinsightError, UnknownNameError

from ..doors import whole_size
from ..parts.images import CheckedImages, check_pool, check_pooled
from ..parts.stepsnet import Steps, block_widths

BLOCKS = {"basic": timm_resnet.BasicBlock, "bottleneck": timm_resnet.Bottleneck}


class Step(nn.Sequential):
    """Blocks that work on the first `width` channels of a map."""

    def __init__(self, width: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__(*blocks)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)`; channels from `width` on are passed by."""
        first = x[:, : self.width]
        for block in self:
            first = block(first)
        return torch.cat([first, x[:, self.width :]], dim=1)


class _StageBlocks:
    """For timm's `block=`: the blocks of one stage, each of the width of its step."""

    def __init__(self, block: Any, widths: Sequence[int]) -> None:
        self.block, self.expansion, self.widths = block, block.expansion, iter(widths)

    def __call__(self, inplanes: int, planes: int, *args: Any, **kwargs: Any) -> nn.Module:
        width = next(self.widths)
        made: nn.Module = self.block(inplanes if width == planes else width * self.expansion, width, *args, **kwargs)
        return made


class StepsResNet(CheckedImages, timm_resnet.ResNet):
    """timm's ResNet, all its arguments, and

    block: "basic", or "bottleneck", whose maps have four times the width.
    stages: `(width, number of blocks)` of each step behind the first block, for each of four stages.
    img_size: not used, as convolutions take any.
    """

    def __init__(
        self,
        block: Literal["basic", "bottleneck"],
        stages: Sequence[Steps],
        img_size: int | tuple[int, int] | None = None,
        **timm_args: Any,
    ) -> None:
        if len(stages) != 4:
            raise LinsightError(f"stages= lists {len(stages)}, but a ResNet has 4: give the steps of each")
        if timm_args.keys() & {"layers", "channels"}:
            raise LinsightError("stages= tells the blocks and widths of each stage: leave layers and channels out")
        if block not in BLOCKS:
            raise UnknownNameError("block", block, BLOCKS)
        check_pool(timm_args.get("global_pool", "avg"))
        check_pooled(timm_args.get("global_pool", "avg"), timm_args.get("num_classes", 1000))
        narrow = [block_widths(steps) for steps in stages]  # which also checks them
        widths = [[steps[-1][0], *row] for steps, row in zip(stages, narrow, strict=True)]
        fns: Any = [_StageBlocks(BLOCKS[block], row) for row in widths]
        layers, channels = tuple(map(len, widths)), tuple(row[0] for row in widths)
        super().__init__(fns, layers, channels=channels, **timm_args)
        for i, steps in enumerate(stages, 1):
            name, expansion = f"layer{i}", BLOCKS[block].expansion
            setattr(self, name, nn.Sequential(*_stage(iter(getattr(self, name)), steps, expansion)))

    @property
    def maps(self) -> int:
        """A map of the stem, and of each stage."""
        return len(self.feature_info)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, for `num_classes` classes, or none (0), on the last map pooled in another way."""
        if global_pool is not None:
            check_pool(global_pool)
        check_pooled(self.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Note the size of images that the model is for; it takes any."""
        if img_size is not None:
            update_model_input_size(self, whole_size(img_size))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's; each block of a step is a group of its own."""
        blocks = [(r"^layer(\d+)\.(\d+)\.(\d+)\.", None), (r"^layer(\d+)\.(\d+)", None)]
        return {**super().group_matcher(coarse), **({} if coarse else {"blocks": blocks})}


def _stage(blocks: Iterator[nn.Module], steps: Steps, expansion: int) -> Iterator[nn.Module]:
    """The modules of a stage: its first block, steps, and blocks of the whole width."""
    yield next(blocks)
    for width, depth in steps[:-1]:
        if depth:
            yield Step(width * expansion, [next(blocks) for _ in range(depth)])
    yield from blocks
