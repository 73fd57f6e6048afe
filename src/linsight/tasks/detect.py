"""The task `detect`: boxes around objects, with a class each, and with masks where the method has them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.data.datasets import Data
from linsight.data.dense import collate
from linsight.data.detection import ObjectSamples, Scene, open_evaluated_objects, open_objects
from linsight.data.images import Batch, Samples
from linsight.data.objects import packed_masks
from linsight.data.sources import Source
from linsight.models.dense import create_detector
from linsight.recipe import Recipe

from ._boxes_drawn import draw_objects, write_objects
from ._detect_page import page_of
from .building import built
from .coco_ap import AveragePrecision
from .meters import Meter
from .records import DetectRecipe
from .task import Column, Shown, Student, Task

_TOGETHER = 8  # masks that are brought to the size of an image at once


@dataclasses.dataclass(frozen=True)
class Detected:
    """The objects in an image file, the surest first, with their probabilities.

    size: height and width of the image.  boxes: x1, y1, x2, y2 of each, in its pixels.
    masks: as COCO's compressed run lengths; empty where the method has none.
    """

    file: str
    size: tuple[int, int]
    classes: tuple[str, ...]
    scores: tuple[float, ...]
    boxes: tuple[tuple[float, ...], ...]
    masks: tuple[dict[str, Any], ...] = dataclasses.field(default=(), repr=False)


class Detect(Task):
    """See the module. `facts["classes"]` are the names of the classes, in the order of the labels."""

    name = "detect"
    about = "boxes around objects, or masks of them"
    record: ClassVar[type[Recipe]] = DetectRecipe
    best = "ap"
    writes = "objects"
    exported = "detect"
    at_once = 4

    # Images

    def open(self) -> Data:
        """See `Task`."""
        data = open_objects(self.recipe)
        self.facts = {"classes": data.classes}
        self.measure()  # a package that is missing is told before an epoch, not after it
        return data

    def open_evaluation(self, split: str | None, *, in_order: bool = False) -> Source:
        """See `Task`."""
        return open_evaluated_objects(self.recipe, split, self.classes)

    @property
    def masks(self) -> bool:
        """True where masks are learned."""
        return "mask" in self.recipe.method

    def samples(self, source: Source, size: tuple[int, int] | None, *, training: bool) -> ObjectSamples:
        """See `Task`: images are as large as the recipe's `sides` or `eval_side` say."""
        return ObjectSamples(source, self.recipe, training)

    @staticmethod
    def collate(samples: list[Any]) -> Batch:
        """See `Task`."""
        return collate(samples)

    # The model

    def build(self) -> nn.Module:
        """See `Task`."""
        recipe = self.recipe
        own = {"channels": recipe.pyramid_width, "hidden": recipe.head_width}
        own |= {"score_thresh": recipe.least_score, "nms_thresh": recipe.nms, "detections": recipe.detections}
        return built(recipe, self.outputs, lambda name, **more: create_detector(name, recipe.method, **own, **more))

    # What it learns

    def loss(self, student: Student, batch: Batch, epoch: int) -> tuple[Tensor, int] | None:
        """See `Task`: the sum of the losses of a detector of torchvision."""
        if not len(batch.targets):
            return None
        images = self._images(batch)
        losses = student.forward(images, [_told(scene, images[0].device) for scene in batch.targets])
        return sum(losses.values(), torch.zeros((), device=images[0].device)), len(images)

    def _images(self, batch: Batch) -> list[Tensor]:
        """The images of a batch, normalised, each in its own size."""
        sizes = (scene.size for scene in batch.targets)
        return [
            image[:, :height, :width] for image, (height, width) in zip(self.inputs(batch.images), sizes, strict=True)
        ]

    # How well it does it

    def measure(self) -> Meter:
        """See `Task`."""
        return AveragePrecision(self.classes, self.masks)

    def answers(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """For each image `size`, and in its own pixels `boxes`, `labels`, `scores`, and `masks` as run lengths."""
        found = model(self._images(batch))
        return [_in_own(answer, scene) for answer, scene in zip(found, batch.targets, strict=True)]

    @property
    def columns(self) -> Sequence[Column]:
        """See `Task`."""
        shown = [("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75")]
        if self.masks:
            shown += [("mask_ap", "mask AP"), ("mask_ap50", "mask AP50"), ("mask_ap75", "mask AP75")]
        return [Column(name, label, ".2f", "%") for name, label in shown]

    # What is shown of it

    def draw(self, path: pathlib.Path, samples: Any, answers: Callable[[Batch], Any]) -> None:
        """See `Task`."""
        draw_objects(path, samples, answers, self.classes, self.recipe.shown_score)

    def examine(self, samples: Samples, batches: Iterable[Batch], answers: Callable[[Batch], Any]) -> Sequence[Shown]:
        """See `Task`: each class, and the images where it errs most and least."""
        meter = AveragePrecision(self.classes, self.masks)
        return page_of(meter, samples.source, batches, answers, self.recipe.shown_score)

    def places(self, batch: Batch) -> list[int]:
        """See `Task`."""
        return [scene.place for scene in batch.targets]

    def predictions(self, answers: Any, files: Sequence[str], top: int) -> list[Detected]:
        """See `Task`: all objects of a score of `shown_score` or more, however many are asked for."""
        found = []
        for answer, file in zip(answers, files, strict=True):
            kept = torch.where(answer["scores"] >= self.recipe.shown_score)[0].tolist()
            boxes, labels, scores = (answer[name][kept].tolist() for name in ("boxes", "labels", "scores"))
            masks = tuple(answer["masks"][place] for place in kept) if "masks" in answer else ()
            names = tuple(self.classes[label] for label in labels)
            found.append(Detected(file, answer["size"], names, tuple(scores), tuple(map(tuple, boxes)), masks))
        return found

    def table(self, found: Sequence[Detected]) -> tuple[list[str], list[list[str]]]:
        """See `Task`."""
        rows = []
        for entry in found:
            sides = [", ".join(f"{side:.0f}" for side in box) for box in entry.boxes]
            shares = [f"{100 * score:.1f} %" for score in entry.scores]
            lines = list(map(list, zip(entry.classes, shares, sides, strict=True)))
            rows += [["" if place else entry.file, *line] for place, line in enumerate(lines or [["none", "", ""]])]
        return ["file", "class", "probability", "x1, y1, x2, y2"], rows

    def told(self, found: Detected) -> dict[str, Any]:
        """See `Task`: masks are run lengths, as COCO's results have them."""
        masks = [{**mask, "counts": mask["counts"].decode("ascii")} for mask in found.masks]
        own = {"file": found.file, "size": found.size, "classes": found.classes, "scores": found.scores}
        return {**own, "boxes": found.boxes, **({"masks": masks} if self.masks else {})}

    def write(self, found: Sequence[Detected], folder: pathlib.Path) -> list[pathlib.Path]:
        """See `Task`: `detections.json` in COCO's form, and for each image NAME.jpg, with its objects drawn."""
        return write_objects(folder, found, [self.told(entry) for entry in found], self.classes)


def _told(scene: Scene, device: torch.device) -> dict[str, Tensor]:
    """Boxes, labels and masks of an image, as a detector of torchvision learns them."""
    assert scene.objects is not None, "it trains on objects"
    told = {"boxes": scene.objects.boxes, "labels": scene.objects.labels}
    if scene.masks is not None:
        told["masks"] = scene.masks
    return {name: values.to(device, non_blocking=True) for name, values in told.items()}


def _in_own(answer: dict[str, Tensor], scene: Scene) -> dict[str, Any]:
    """The answer for an image as it was given, in the pixels of its file."""
    scales = [own / given for own, given in zip(scene.own, scene.size, strict=True)]
    boxes = answer["boxes"] * answer["boxes"].new_tensor([scales[1], scales[0]] * 2)
    found: dict[str, Any] = {**answer, "boxes": boxes, "size": scene.own}
    if "masks" in answer:
        found["masks"] = []
        for some in answer["masks"].split(_TOGETHER):
            if scene.own != scene.size:
                some = F.interpolate(some, scene.own, mode="bilinear")
            found["masks"] += packed_masks(some[:, 0] > 0.5)
    return found
