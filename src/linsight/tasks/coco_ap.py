"""How well objects are found: average precision as COCO has it, by pycocotools, on what batches gave."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from linsight.data.images import Batch
from linsight.data.objects import Objects
from linsight.errors import LinsightError, MissingExtraError

# In the order in which COCO sums them up.
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
KINDS = {"bbox": "", "segm": "mask_"}  # of overlap, and what stands before the names of its measures


class Detections(NamedTuple):
    """Objects found in an image, in its own pixels: boxes `(N, 4)` as x1, y1, x2, y2, scores and labels `(N,)`.

    masks: as COCO's compressed run lengths; empty where there are none.
    """

    boxes: Any
    scores: Any
    labels: Any
    masks: Sequence[dict[str, Any]] = ()


class AveragePrecision:
    """Detections and objects of images, and their average precision: at overlaps of 0.5 to 0.95, at 0.5, at 0.75.

    Lin et al., "Microsoft COCO", ECCV 2014, as pycocotools computes it: of small objects, below 32 x 32 pixels, medium
    and large ones, from 96 x 96 on, too. What lies in a crowd is not counted.

    Args:
        classes: names of the classes.
        masks: that of masks, too.

    Raises:
        MissingExtraError: pycocotools is not installed.
    """

    def __init__(self, classes: Sequence[str], masks: bool = False) -> None:
        _tools()
        self.classes, self.masks = tuple(classes), masks
        self.images: list[tuple[Detections, Objects]] = []

    def update(self, answers: Sequence[dict[str, Any]], batch: Batch) -> None:
        """answers: of each image `boxes`, `scores`, `labels` and, as run lengths, `masks`, in its own pixels."""
        for answer, scene in zip(answers, batch.targets, strict=True):
            boxes, scores, labels = (_array(answer[name]) for name in ("boxes", "scores", "labels"))
            self.images.append((Detections(boxes, scores, labels, tuple(answer.get("masks", ()))), scene.objects))

    def merge_state(self, other: "AveragePrecision") -> None:
        """See `Meter`."""
        self.images += other.images

    def compute(self) -> dict[str, float]:
        """In percent `ap`, `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`, and of masks `mask_ap` and so on.

        Of several classes `ap:NAME` is that of each. Sizes and classes that no object has are left out.

        Raises:
            LinsightError: there is no object at all.
        """
        found: dict[str, float] = {}
        for kind, before in KINDS.items():
            if kind == "bbox" or self.masks:
                evaluated = self.evaluated(kind)
                stats = zip(NAMES, evaluated.stats, strict=False)
                found |= {before + name: 100 * float(value) for name, value in stats if value >= 0}
                if len(self.classes) > 1:
                    found |= {f"{before}ap:{name}": value for name, value in self.each(evaluated).items()}
        if "ap" not in found:
            raise LinsightError(f"there is no object to find in {len(self.images)} images: precision is of objects")
        return found

    def each(self, evaluated: Any) -> dict[str, float]:
        """The average precision of each class that there is, in percent, of what `evaluated` gives."""
        precision = evaluated.eval["precision"][..., 0, -1]  # (overlaps, recalls, classes)
        rows = {name: precision[..., place] for place, name in enumerate(self.classes)}
        return {name: 100 * float(row[row >= 0].mean()) for name, row in rows.items() if (row >= 0).any()}

    def evaluated(self, kind: str = "bbox") -> Any:
        """pycocotools' `COCOeval`, summed up. kind: "bbox" for boxes, "segm" for masks."""
        coco, evaluation = _tools()
        masks = kind == "segm"
        truths, guesses = list[dict[str, Any]](), list[dict[str, Any]]()
        for number, (found, objects) in enumerate(self.images, 1):
            truths += [{**row, "id": len(truths) + place, "image_id": number} for place, row in _rows(objects, masks)]
            guesses += [{**row, "image_id": number} for row in _guesses(found, masks)]
        sizes = [objects.size for _, objects in self.images]
        images = [{"id": number, "height": high, "width": wide} for number, (high, wide) in enumerate(sizes, 1)]
        categories = [{"id": label, "name": name} for label, name in enumerate(self.classes)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            truth, guess = coco(), coco()
            guess.dataset = {"images": images, "categories": categories, "annotations": []}
            truth.dataset = {**guess.dataset, "annotations": truths}
            truth.createIndex()
            guess.createIndex()
            evaluated = evaluation(truth, truth.loadRes(guesses) if guesses else guess, kind)
            evaluated.evaluate()
            evaluated.accumulate()
            evaluated.summarize()
        return evaluated


def _rows(objects: Objects, masks: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of an image as COCO's file has them, with their numbers, from 1: an id of 0 matches nothing."""
    columns = [column.tolist() for column in (objects.boxes, objects.labels, objects.crowds, objects.areas)]
    runs = objects.runs() if masks else [None] * len(columns[0])
    for place, (box, label, crowd, area, own) in enumerate(zip(*columns, runs, strict=True), 1):
        row = {"bbox": _sides(box), "category_id": label, "iscrowd": int(crowd), "area": area}
        yield place, row if own is None else {**row, "segmentation": own}


def _guesses(found: Detections, masks: bool) -> Iterator[dict[str, Any]]:
    """The detections of an image as COCO's results have them: with masks, boxes and areas are those of the masks."""
    boxes, scores, labels = (column.tolist() for column in (found.boxes, found.scores, found.labels))
    for place, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        shape = {"segmentation": found.masks[place]} if masks else {"bbox": _sides(box)}
        yield {"category_id": label, "score": score, **shape}


def _sides(box: Sequence[float]) -> list[float]:
    """x, y, width and height of x1, y1, x2, y2."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _tools() -> tuple[Any, Any]:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingExtraError("pycocotools", "dense", "average precision") from error
    return COCO, COCOeval
