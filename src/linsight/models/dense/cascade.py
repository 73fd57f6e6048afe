"""The heads of Cascade R-CNN: three stages, each of which starts from the boxes of the one before.

Zhaowei Cai and Nuno Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", CVPR 2018, as detectors
with Swin backbones have it: boxes by class, GIoU on decoded boxes, a mask head in each stage.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, remove_small_boxes

Target = dict[str, Tensor]

_GIOU = 10.0  # weight of the loss of boxes beside that of classes
_SMALLEST = 1e-2  # pixels of a side


class Level(NamedTuple):
    """The setting of a stage: overlap from which a region is an object, weight of its losses, scales of box codes."""

    overlap: float
    weight: float
    scales: tuple[float, float, float, float]


# The scales are the inverse of the standard deviations that the published detectors divide by.
LEVELS = (
    Level(0.5, 1.0, (10.0, 10.0, 5.0, 5.0)),
    Level(0.6, 0.5, (20.0, 20.0, 10.0, 10.0)),
    Level(0.7, 0.25, (30.0, 30.0, 15.0, 15.0)),
)


class Stage(RoIHeads):
    """A stage: torchvision's heads, asked in parts.

    Args:
        level: gives the overlaps and the scales of `RoIHeads`, whose other arguments follow by name.
    """

    def __init__(self, level: Level, **heads: Any) -> None:
        own = {"fg_iou_thresh": level.overlap, "bg_iou_thresh": level.overlap, "bbox_reg_weights": level.scales}
        super().__init__(**own, **heads)
        self.weight = level.weight

    def answer(self, features: Any, regions: list[Tensor], sizes: Any) -> tuple[Tensor, Tensor]:
        """Logits `(N, 1 + K)` of the regions of all images, and codes of a box for each class, `(N, 4 + 4 K)`."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, regions, sizes)))

    def decoded(self, codes: Tensor, regions: list[Tensor]) -> Tensor:
        """The boxes that codes stand for, `(N, 1 + K, 4)` in pixels."""
        return self.box_coder.decode(codes, regions)

    def losses(self, logits: Tensor, boxes: Tensor, labels: list[Tensor], objects: Tensor) -> dict[str, Tensor]:
        """The weighted losses of logits and decoded boxes. objects: the box of the object of each region, `(N, 4)`."""
        wanted = torch.cat(labels)
        found = torch.where(wanted > 0)[0]
        box = generalized_box_iou_loss(boxes[found, wanted[found]], objects[found], reduction="sum")
        return {
            "loss_classifier": self.weight * F.cross_entropy(logits, wanted),
            "loss_box_reg": self.weight * _GIOU * box / len(wanted),
        }

    def mask_logits(self, features: Any, regions: list[Tensor], sizes: Any) -> Tensor:
        """Logits of masks `(N, 1 + K, M, M)`, in the frame of each region."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, regions, sizes)))

    def mask_loss(
        self,
        features: Any,
        regions: list[Tensor],
        sizes: Any,
        matched: list[Tensor],
        labels: list[Tensor],
        targets: Any,
    ) -> Tensor:
        """The weighted loss of the masks of regions that are objects. matched: the number of the object of each."""
        found = [torch.where(label > 0)[0] for label in labels]
        regions = [own[places] for own, places in zip(regions, found, strict=True)]
        matched = [own[places] for own, places in zip(matched, found, strict=True)]
        masks, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
        return self.weight * maskrcnn_loss(self.mask_logits(features, regions, sizes), regions, masks, classes, matched)


class CascadeHeads(nn.Module):
    """Stages in a row, as the `roi_heads` of a detector of torchvision.

    In training each stage matches and samples anew what the one before made of its boxes. In evaluation the logits of
    the stages are averaged, and so are the masks that each of them sees in the last boxes.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(
        self,
        features: Any,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Detections of each image, in evaluation, or losses by name, in training. Labels are 1 .. K."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets or [])
        return self._detections(features, proposals, image_shapes), {}

    def _losses(self, features: Any, regions: list[Tensor], sizes: Any, targets: list[Target]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            regions, matched, labels, _ = stage.select_training_samples(regions, targets)
            logits, codes = stage.answer(features, regions, sizes)
            boxes = stage.decoded(codes, regions)
            objects = torch.cat([_chosen(target["boxes"], own) for target, own in zip(targets, matched, strict=True)])
            found = stage.losses(logits, boxes, labels, objects)
            if stage.has_mask():
                found["loss_mask"] = stage.mask_loss(features, regions, sizes, matched, labels, targets)
            losses |= {f"{name}_{number}": loss for name, loss in found.items()}
            moved = refined(logits, boxes, torch.cat(labels)).split([len(own) for own in regions])
            regions = [clip_boxes_to_image(own, size) for own, size in zip(moved, sizes, strict=True)]
            regions = [own[remove_small_boxes(own, _SMALLEST)] for own in regions]
        return losses

    def _detections(self, features: Any, regions: list[Tensor], sizes: Any) -> list[Target]:
        stages: list[Any] = list(self.stages)
        counts = [own.shape[0] for own in regions]  # no len(): in a graph nobody knows how many
        logits, codes = stages[0].answer(features, regions, sizes)
        total = logits
        for before, stage in itertools.pairwise(stages):
            moved = refined(logits, before.decoded(codes, regions)).split(counts)
            regions = [clip_boxes_to_image(own, size) for own, size in zip(moved, sizes, strict=True)]
            logits, codes = stage.answer(features, regions, sizes)
            total = total + logits
        found = stages[-1].postprocess_detections(total / len(stages), codes, regions, sizes)
        names = ("boxes", "scores", "labels")
        answers = [dict(zip(names, own, strict=True)) for own in zip(*found, strict=True)]
        if stages[0].has_mask():
            boxes, labels = ([own[name] for own in answers] for name in ("boxes", "labels"))
            seen = [maskrcnn_inference(stage.mask_logits(features, boxes, sizes), labels) for stage in stages]
            for own, *masks in zip(answers, *seen, strict=True):
                own["masks"] = torch.stack(masks).mean(0)
        return answers


def refined(logits: Tensor, boxes: Tensor, labels: Tensor | None = None) -> Tensor:
    """The boxes `(N, 4)` that the next stage starts from: those of the label, or of the likeliest class of an object.

    Args:
        logits: `(N, 1 + K)`.
        boxes: `(N, 1 + K, 4)`, one for each class.
        labels: `(N,)` of regions in training, 0 for those that are no object.
    """
    classes = 1 + logits[:, 1:].argmax(1)
    if labels is not None:
        classes = torch.where(labels > 0, labels, classes)
    return boxes.detach()[torch.arange(boxes.shape[0], device=boxes.device), classes]


def _chosen(boxes: Tensor, places: Tensor) -> Tensor:
    """Boxes by their places; an image without objects has nothing to choose, and its regions are no objects."""
    return boxes[places] if len(boxes) else boxes.new_zeros(len(places), 4)
