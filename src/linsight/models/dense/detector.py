"""`create_detector`: a backbone with the heads of a detector, from the parts of torchvision."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from linsight.errors import CapabilityError, LinsightError, UnknownNameError
from linsight.ops import to_multiple, traced

from ..parts.dense import inside
from ..parts.images import check_images
from ..steps import StreamPlan
from .backbone import pyramid as backbone_of
from .cascade import LEVELS, CascadeHeads, Stage
from .graph import ObjectGraph
from .levels import Anchors, Codes, Pyramid, Regions

Method = Literal["mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "cascade_rcnn", "retinanet"]
METHODS: tuple[str, ...] = get_args(Method)
Target = dict[str, Tensor]
Head = TypeVar("Head", bound=nn.Module)

_BODY = "backbone.body."  # where a detector keeps its backbone
_BOX, _MASK = 7, 14  # cells of a side of a region
_CONVS = 4


class Unchanged(GeneralizedRCNNTransform):
    """Images as the data pipeline made them, padded to a common size, a multiple of 32.

    Resizing and normalising belong to the pipeline: its workers do them, with antialiasing, and it does the same for
    every task. Only where a `min_size` is given are images resized here, as torchvision does it, and boxes are told in
    the pixels of what was given. Normalised they are never.
    """

    def __init__(self, min_size: int | Sequence[int] | None, max_size: int) -> None:
        super().__init__(min_size or 1, max_size, [0.0], [1.0])
        self.resizes = min_size is not None

    def normalize(self, image: Tensor) -> Tensor:
        """The image as it is."""
        return image

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """The image and its objects, resized if that was asked for."""
        return super().resize(image, target) if self.resizes else (image, target)

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Images on one canvas; in a graph there is one."""
        if not traced(*images):
            return super().batch_images(images, size_divisible)
        (image,) = images
        height, width = (to_multiple(side, size_divisible) - side for side in image.shape[1:])
        return F.pad(image, (0, width, 0, height))[None]


class Detector(nn.Module):
    """The base of detectors: all that they have beside the forward of torchvision.

    In training it takes images and targets, and gives losses by name; in evaluation it gives for each image `boxes`
    `(N, 4)` as x1, y1, x2, y2 in pixels, `labels` `(N,)` of 0 .. K - 1, `scores` `(N,)`, best first, and `masks`
    `(N, 1, H, W)`, the probability of each pixel, where the method has them.
    """

    method: str
    num_classes: int
    backbone: Any
    first = 0  # the label of the first class inside
    transform: Unchanged

    @property
    def has_masks(self) -> bool:
        """True where it gives masks, and learns from them."""
        return "mask" in self.method

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Target]:
        """Losses, or detections.

        Args:
            images: `(B, C, H, W)`, or `(C, H, W)` of any sizes, normalised.
            targets: for each image `boxes` `(N, 4)` with x1 < x2 and y1 < y2, `labels` `(N,)` of 0 .. K - 1, and for
                masks `masks` `(N, H, W)` of 0 and 1. There may be no object. In evaluation they are not read.

        Raises:
            LinsightError: images or targets are missing or of another form.
        """
        images = list(images)
        if hasattr(self.backbone.body, "in_chans"):  # a pyramid of the user's own may take what it likes
            for image in images:
                check_images(self, image[None] if isinstance(image, Tensor) else image)
        if not self.training:
            found: list[Target] = super().forward(images, None) if images else []
            for own in found:
                own["labels"] = own["labels"] - self.first
            return found
        _check(self, images, targets)
        inside = [{**target, "labels": target["labels"].long() + self.first} for target in targets or ()]
        return super().forward(images, inside)

    def as_graph(self) -> ObjectGraph:
        """A copy that takes an image and gives tensors, for exporters."""
        return ObjectGraph(self)

    def stream_plan(self) -> StreamPlan:
        """Refused: boxes are chosen among those of the whole image."""
        raise CapabilityError(
            "a detector does not stream, its boxes are chosen among those of the whole image: leave --stream out, or "
            "cut the image into parts that overlap"
        )

    # What timm's models have, of the backbone.

    @property
    def pretrained_cfg(self) -> Mapping[str, Any]:
        """The configuration of the backbone, as timm tells it; what weights of a classifier lack is the classifier."""
        cfg = self.backbone.body.pretrained_cfg
        own = cfg.get("classifier") or ()
        fresh = [_BODY + name for name in ([own] if isinstance(own, str) else own)]
        heads = ("backbone.fpn", "rpn", "roi_heads", "head")
        return {**cfg, "num_classes": self.num_classes, "classifier": (*fresh, *heads)}

    @property
    def in_chans(self) -> int:
        """Channels of images."""
        return self.backbone.body.in_chans

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters of the backbone that are kept from weight decay."""
        own = getattr(self.backbone.body, "no_weight_decay", set)
        return {_BODY + name for name in own()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the backbone, as timm tells them; the pyramid and the heads are the last one."""
        return {kind: inside(_BODY, rule) for kind, rule in self.backbone.body.group_matcher(coarse).items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Have the backbone compute activations anew in the backward pass, which saves memory."""
        self.backbone.body.set_grad_checkpointing(enable)


class TwoStage(Detector, GeneralizedRCNN):
    """Faster R-CNN, Mask R-CNN or Cascade R-CNN. Inside, label 0 is none of the classes."""

    first = 1


class OneStage(Detector, RetinaNet):
    """RetinaNet (Lin et al., ICCV 2017)."""


def create_detector(
    backbone: str | nn.Module,
    method: str = "mask_rcnn",
    *,
    num_classes: int,
    channels: int = 256,
    hidden: int = 1024,
    samples: int = 512,
    min_size: int | Sequence[int] | None = None,
    max_size: int = 1333,
    score_thresh: float = 0.05,
    nms_thresh: float = 0.5,
    detections: int = 100,
    **backbone_args: Any,
) -> Detector:
    """A detector on a backbone.

    Its heads are those of the published detectors, but that torchvision has a smooth L1 loss of boxes where they have
    L1, and samples four places of a cell in RoIAlign. Anchors follow the strides of the backbone, whatever these are:
    three of 8 cells a side on each level for R-CNN, nine of 4 cells and more for RetinaNet.

    Args:
        backbone: as of `create_model`, with any mechanism, or a model of timm, "timm/NAME"; or a module that gives
            maps, finest first, whose widths and strides are its `channels` and `strides`.
        method: faster_rcnn (boxes), mask_rcnn (and masks), cascade_rcnn, cascade_mask_rcnn (three stages), retinanet
            (boxes, in one stage).
        num_classes: K. Labels are 0 .. K - 1.
        channels: of the feature pyramid and of convolutions in heads.
        hidden: width of fully connected layers in heads.
        samples: regions of an image that the heads learn from.
        min_size: the shorter side that images are resized to, or several to draw from in training; None: they come in
            the size that they are to have.
        max_size: of the longer side then.
        score_thresh: the least score of a detection.
        nms_thresh: of two detections of a class that overlap by more than this, the better one is kept.
        detections: of an image, at most.
        backbone_args: of a backbone by name, as of `linsight.models.dense.pyramid`: attention, in_chans and the like.

    Raises:
        UnknownNameError: no such method, backbone or mechanism; the nearest is offered.
        LinsightError: no class, or a backbone that cannot be had with these arguments.
    """
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise LinsightError(f"num_classes={num_classes!r} must be 1 or more: the objects to find are of some class")
    dense = method == "retinanet"
    if isinstance(backbone, str):
        backbone = backbone_of(backbone, **backbone_args)
    elif backbone_args:
        raise LinsightError(f"{next(iter(backbone_args))}= is for a backbone by name: this one is made already")
    pyramid = Pyramid(backbone, channels, dense=dense)
    limits = {"score_thresh": score_thresh, "nms_thresh": nms_thresh, "detections_per_img": detections}
    model: Any
    if dense:
        anchors = Anchors(pyramid.strides, base=4, octaves=3)
        head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes)
        model = OneStage(pyramid, num_classes, anchor_generator=anchors, head=_exact(head), **limits)
        model.transform = Unchanged(min_size, max_size)
    else:

        def heads() -> dict[str, Any]:
            parts = _heads(method, pyramid, hidden, 1 + num_classes)
            return {**parts, **limits, "batch_size_per_image": samples, "positive_fraction": 0.25}

        regions: nn.Module
        if "cascade" in method:
            regions = CascadeHeads(Stage(level, **heads()) for level in LEVELS)
        else:
            regions = RoIHeads(**heads(), fg_iou_thresh=0.5, bg_iou_thresh=0.5, bbox_reg_weights=None)
        model = TwoStage(pyramid, _proposals(pyramid), regions, Unchanged(min_size, max_size))
        for part in model.modules():
            if hasattr(part, "box_coder"):
                part.box_coder = Codes(part.box_coder.weights)
    model.method, model.num_classes = method, num_classes
    return model


def _proposals(pyramid: Pyramid) -> RegionProposalNetwork:
    """The regions that may be objects (Ren et al., NeurIPS 2015), from all levels."""
    anchors = Anchors(pyramid.strides, base=8)
    return RegionProposalNetwork(
        anchors,
        _exact(RPNHead(pyramid.out_channels, anchors.num_anchors_per_location()[0])),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )


def _heads(method: str, pyramid: Pyramid, hidden: int, labels: int) -> dict[str, Any]:
    """The parts of torchvision's `RoIHeads`."""
    width = pyramid.out_channels
    head: nn.Module = TwoMLPHead(width * _BOX**2, hidden)
    if "cascade" in method:
        head = FastRCNNConvFCHead((width, _BOX, _BOX), [width] * _CONVS, [hidden], norm_layer=nn.BatchNorm2d)
    found: dict[str, Any] = {
        "box_roi_pool": Regions(pyramid, _BOX),
        "box_head": head,
        "box_predictor": _exact(FastRCNNPredictor(hidden, labels)),
    }
    if "mask" in method:
        found |= {
            "mask_roi_pool": Regions(pyramid, _MASK),
            "mask_head": MaskRCNNHeads(width, [width] * _CONVS, dilation=1),
            "mask_predictor": _exact(MaskRCNNPredictor(width, width, labels)),
        }
    return found


def _exact(head: Head) -> Head:
    """A head whose answers are float32, whatever autocast made of them: boxes in bfloat16 are off by many pixels."""
    head.register_forward_hook(_to_float)
    return head


def _to_float(_: nn.Module, __: Any, answer: Any) -> Any:
    return tree_map(Tensor.float, answer)


def _check(model: Detector, images: Any, targets: Any) -> None:
    """Raise unless there is a target of the right form for each image."""
    if targets is None or len(targets) != len(images):
        said = "none" if targets is None else str(len(targets))
        raise LinsightError(f"a detector learns from a target for each image: {len(images)} images, {said} given")
    if not images:
        raise LinsightError("a detector learns from one image or more: none given")
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        if not isinstance(target, Mapping):
            raise LinsightError(f"target {number} is a {type(target).__name__}: give a dict of 'boxes' and 'labels'")
        count = len(target["boxes"]) if isinstance(target.get("boxes"), Tensor) else 0
        forms: dict[str, tuple[int, ...]] = {"boxes": (count, 4), "labels": (count,)}
        if model.has_masks:
            forms["masks"] = (count, *image.shape[-2:])
        for name, form in forms.items():
            given = target.get(name)
            said = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else "none"
            if not isinstance(given, Tensor) or tuple(given.shape) != form:
                raise LinsightError(f"target {number} has '{name}' of {said}: {model.method} wants a tensor {form}")
        labels, boxes = target["labels"], target["boxes"]
        if labels.is_floating_point() or not boxes.is_floating_point():
            raise LinsightError(
                f"target {number} has boxes of {boxes.dtype} and labels of {labels.dtype}: boxes are in floating "
                f"point, labels are whole numbers"
            )
        if count and not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
            raise LinsightError(f"target {number} has labels outside of 0 .. {model.num_classes - 1}, the classes")
        if not bool(boxes.isfinite().all() & (boxes[:, 2:] > boxes[:, :2]).all()):  # NaN is above nothing
            raise LinsightError(
                f"target {number} has a box without height or width, or with NaN: they are x1, y1, x2, y2"
            )
