"""A detector as a graph: tensors in, tensors out, with nothing that asks how many objects there are.

Exporters refuse, or freeze, what depends on a number that the image decides. torchvision's detectors depend on it in
few places; those are put otherwise here.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models.detection import _utils, transform
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.ops import boxes as box_ops
from torchvision.ops import nms

_SAME = 0.95  # of objects that two forms of a detector agree on, at least
_Objects = Mapping[str, Tensor]


class ObjectGraph(nn.Module):
    """An image `(1, C, H, W)` -> the objects that a detector finds in it, best first, as a dict of tensors.

    boxes: `(N, 4)` as x1, y1, x2, y2 in pixels.  labels: `(N,)`, 0 .. K - 1.  scores: `(N,)`.
    masks: `(N, 1, H, W)`, the probability of each pixel, where the method has them.

    detector: copied, since its least score becomes a buffer.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector)
        self.pretrained_cfg = detector.pretrained_cfg
        for part in self._limited():
            least = part.__dict__.pop("score_thresh")
            part.register_buffer("score_thresh", torch.tensor(float(least)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See the class."""
        with _countless():
            (found,) = self.detector(images.unbind())
        return {name: found[name] for name in ("boxes", "labels", "scores", "masks") if name in found}

    def _limited(self) -> list[Any]:
        """The parts that leave out objects of a low score."""
        return [part for part in self.detector.modules() if hasattr(part, "detections_per_img")]

    @property
    def least(self) -> float:
        """The least score of an object; to set it changes graphs that hold the same tensors, too."""
        return float(self._limited()[-1].score_thresh)

    @least.setter
    def least(self, score: float) -> None:
        for part in self._limited():
            part.score_thresh.fill_(score)

    def telling(self, images: Sequence[Tensor]) -> float:
        """A least score by which there are objects in images, most likely: a graph is known by what it finds."""
        before, self.least = self.least, 0.0
        try:
            return min(_middle(self(image)["scores"]) for image in images)
        finally:
            self.least = before

    def error_of(self, found: _Objects, wanted: _Objects) -> float:
        """The error of objects: of scores, boxes and masks together, each as a share of the largest number wanted.

        Each object is held against the nearest one of its label. One in twenty may have none: where the last digit of
        a score or an overlap decides who is left out, two forms of a detector decide otherwise.
        """
        return max(_distance(found, wanted), _distance(wanted, found))


def _middle(scores: Tensor) -> float:
    """A number in the widest gap of the middle half of scores, from where rounding moves none to the other side."""
    ordered = torch.cat([scores.new_zeros(2), scores.sort().values])
    part = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
    place = int(part.diff().argmax())
    return float(part[place : place + 2].mean())


def _distance(some: _Objects, others: _Objects) -> float:
    """How far objects are from the nearest of others, but for the farthest few."""
    count = len(some["scores"])
    if not count or not len(others["scores"]):
        return math.inf if count else 0.0
    apart = torch.where(some["labels"][:, None] == others["labels"], 0.0, math.inf).double()
    for name in ("scores", "boxes"):
        mine, yours = (of[name].reshape(len(of[name]), -1).double() for of in (some, others))
        largest = max(float(mine.abs().max()), float(yours.abs().max()), torch.finfo(torch.float32).tiny)
        apart += torch.cdist(mine, yours, math.inf) / largest
    nearest, places = apart.min(1)
    if "masks" in some:
        mine, yours = some["masks"].flatten(1), others["masks"][places].flatten(1)
        nearest += (mine - yours).abs().amax(1) if mine.is_floating_point() else (mine != yours).float().mean(1)
    return float(nearest.sort().values[math.ceil(_SAME * count) - 1])


@contextlib.contextmanager
def _countless() -> Iterator[None]:
    """While entered, torchvision's detectors do not ask how many objects there are."""
    with contextlib.ExitStack() as stack:
        for module, name, form in (
            (box_ops, "batched_nms", nms_of_each),
            (_utils, "_topk_min", _at_most),
            (transform, "paste_masks_in_image", pasted),
        ):
            stack.enter_context(mock.patch.object(module, name, form))
        yield


def nms_of_each(boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float) -> Tensor:
    """Places of the boxes that are kept, best first, where those of each label are for themselves: far from others.

    scores: not negative.
    """
    # torch notes of the operator that it keeps two boxes or more: two are put beside them, which are dropped again.
    beside = boxes.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    far = torch.cat([boxes, beside]).max() + 9
    apart = boxes + (labels.to(boxes.dtype) * far)[:, None]
    kept = nms(torch.cat([apart, beside]), torch.cat([scores, scores.new_full((2,), -1)]), overlap)
    return kept[kept < boxes.shape[0]]


def _at_most(x: Tensor, most: int, axis: int) -> Any:
    return torch.sym_min(most, x.shape[axis])


def pasted(masks: Tensor, boxes: Tensor, size: Any, padding: int = 1) -> Tensor:
    """Masks `(N, 1, m, m)` of regions, each brought to its box in an image of `size`: `(N, 1, H, W)`.

    As torchvision pastes them, bilinearly to whole pixels, but by two matrices for each mask, of rows and of columns.
    """
    masks, scale = expand_masks(masks, padding=padding)
    boxes = expand_boxes(boxes, scale).to(torch.int64)
    left, top, right, bottom = boxes.unbind(1)
    cells = masks.shape[-1]
    rows, columns = (
        _resized(*ends, count, cells) for ends, count in (((top, bottom), size[0]), ((left, right), size[1]))
    )
    return (rows.to(masks.dtype) @ masks[:, 0] @ columns.to(masks.dtype).transpose(1, 2))[:, None]


def _resized(first: Tensor, last: Tensor, count: Any, cells: int) -> Tensor:
    """Matrices `(N, count, cells)` that bring cells to the pixels from first to last, of `count`."""
    pixels = torch.arange(count, device=first.device)
    place = (pixels - first[:, None] + 0.5) * (cells / (last - first + 1).clamp(min=1))[:, None] - 0.5
    weights = 1 - (place.clamp(0, cells - 1)[..., None] - torch.arange(cells, device=first.device)).abs()
    inside = (pixels >= first[:, None]) & (pixels <= last[:, None])
    return weights.clamp(min=0) * inside[..., None]
