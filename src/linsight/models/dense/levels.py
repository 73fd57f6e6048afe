"""The levels of a feature pyramid: anchors and pooled regions that go by known strides, in float32.

torchvision guesses strides from sizes of maps: a map of 13 columns of an image of 800 pixels has 61 there, not 64, and
regions of images of a few dozen pixels come from the wrong level. Here a level keeps the stride that it has.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_area, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

_RATIOS = (0.5, 1.0, 2.0)
_TOP = 14  # sides of regions in cells: from 14 cells of a level on, they are pooled from it


class Pyramid(nn.Module):
    """A backbone with a feature pyramid on its maps (Lin et al., CVPR 2017), as the detectors of torchvision want one.

    out_channels: of every level.  strides: pixels of a cell, by level.  names: of the levels that regions are pooled
    from, which are those of the backbone's maps.

    Args:
        body: gives a list of maps, finest first, whose widths and strides are its `channels` and `strides`.
        channels: of the pyramid.
        dense: with two more levels by convolutions, the first from the last map, and no map finer than stride 8, as
            RetinaNet has them; else with one more level, each second cell of the last one.
    """

    def __init__(self, body: nn.Module, channels: int, *, dense: bool = False) -> None:
        super().__init__()
        strides, widths = list[float](body.strides), list[int](body.channels)  # type: ignore[arg-type]
        self.skipped = min(sum(stride < 8 for stride in strides), len(strides) - 1) if dense else 0
        strides, widths = strides[self.skipped :], widths[self.skipped :]
        extra: ExtraFPNBlock = LastLevelMaxPool()
        if dense:
            extra = LastLevelP6P7(widths[-1], channels)
            extra.use_P5 = False  # it would be, where the two have one width
        self.body = body
        self.fpn = FeaturePyramidNetwork(widths, channels, extra)
        self.out_channels = channels
        self.names = [str(level) for level in range(len(strides))]
        self.strides = (*strides, *(strides[-1] * 2**more for more in ((1, 2) if dense else (1,))))

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Images `(B, C, H, W)` -> levels `(B, out_channels, h, w)` by name, finest first."""
        maps = list(self.body(images))
        if self.training and self.skipped:  # for a gradient in all parameters, which processes wait for
            maps[-1] = maps[-1] + 0 * sum(skipped.mean() for skipped in maps[: self.skipped])
        return self.fpn(OrderedDict(zip(self.names, maps[self.skipped :], strict=True)))


class Anchors(AnchorGenerator):
    """Anchors of three shapes in each cell, in float32 whatever the maps are.

    In bfloat16, which autocast makes of maps, places beyond 256 pixels would be off by one and more.

    Args:
        strides: of the levels, in pixels.
        base: the side of an anchor in cells.
        octaves: how many sizes there are, up to twice that one.
    """

    def __init__(self, strides: Sequence[float], base: float, octaves: int = 1) -> None:
        sizes = tuple(tuple(stride * base * 2 ** (step / octaves) for step in range(octaves)) for stride in strides)
        super().__init__(sizes, (_RATIOS,) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """For each image all anchors `(A, 4)`, as x1, y1, x2, y2 in pixels."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        sizes = [level.shape[-2:] for level in feature_maps]
        anchors = torch.cat(self.grid_anchors(sizes, [[stride, stride] for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class LevelOf:
    """The level of each region, by its size (eq. 1 of the FPN paper): the coarsest in which it has 14 cells a side.

    For strides 4, 8, 16, 32 these are the paper's levels, whose regions of 224 pixels come from stride 16.
    """

    def __init__(self, strides: Sequence[float]) -> None:
        self.sides = [_TOP * stride for stride in strides[1:]]

    def __call__(self, boxes: list[Tensor]) -> Tensor:
        """Boxes `(N, 4)` of each image -> the levels of all, `(sum N,)`."""
        sides = torch.cat([box_area(found) for found in boxes]).sqrt()
        return (sides[:, None] >= torch.tensor(self.sides, dtype=sides.dtype, device=sides.device)).sum(1)


class Regions(MultiScaleRoIAlign):
    """RoIAlign (He et al., ICCV 2017) of regions, each from one level.

    Args:
        pyramid: whose levels they are.
        size: cells of a side of what is pooled.
    """

    def __init__(self, pyramid: Pyramid, size: int) -> None:
        super().__init__(pyramid.names, size, sampling_ratio=2)
        strides = pyramid.strides[: len(pyramid.names)]
        self.scales, self.map_levels = [1 / stride for stride in strides], LevelOf(strides)

    def forward(self, x: Any, boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """Levels by name, and boxes `(N, 4)` of each image -> cells of all, `(sum N, C, size, size)`.

        As torchvision pools them, but that it counts boxes, which a graph cannot.
        """
        levels = [x[name] for name in self.featmap_names]
        images = [torch.full_like(own[:, :1], number) for number, own in enumerate(boxes)]
        regions = torch.cat([torch.cat(images), torch.cat(boxes)], dim=1)  # (sum N, 5): image, x1, y1, x2, y2
        found = regions.new_zeros(regions.shape[0], levels[0].shape[1], *self.output_size, dtype=levels[0].dtype)
        of_level = self.map_levels(boxes)
        for number, (level, scale) in enumerate(zip(levels, self.scales, strict=True)):
            places = torch.where(of_level == number)[0]
            cells = roi_align(level, regions[places], self.output_size, scale, self.sampling_ratio)
            found = found.index_put((places,), cells.to(found.dtype))
        return found


class Codes(BoxCoder):
    """Boxes as shifts of others: torchvision's, but that it counts boxes, which a graph cannot."""

    def decode(self, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
        """Codes `(sum N, 4 K)` and the boxes that they shift, `(N, 4)` of each image -> boxes `(sum N, K, 4)`."""
        return self.decode_single(rel_codes, torch.cat(boxes)).unflatten(1, (-1, 4))
