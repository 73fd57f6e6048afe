"""Parts of a run's page on detection: each class, and the images where the model errs most and least."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from PIL import Image
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_pil_image

from linsight.data.images import Batch
from linsight.data.objects import Objects
from linsight.data.sources import Source

from ._boxes_drawn import in_own_size, side_by_side
from .coco_ap import AveragePrecision
from .task import Shown

_EACH = 6  # images where it does best, and as many where it does worst
_WIDE = 512  # pixels of one of two pictures side by side, at most
_OVERLAP = 0.5  # from which on an object is found


def page_of(
    meter: AveragePrecision,
    source: Source,
    batches: Iterable[Batch],
    answers: Callable[[Batch], Any],
    least: float,
) -> list[Shown]:
    """The parts. meter: a new one.  answers: of each image of a batch.  least: score of what is drawn and counted."""
    counts, found = Counter[int](), list[tuple[float, int, str, Image.Image]]()
    for batch in batches:
        given = answers(batch) if len(batch.images) else []
        meter.update(given, batch)
        for image, scene, answer in zip(batch.images, batch.targets, given, strict=True):
            objects = scene.objects.learned()
            counts.update(objects.labels.tolist())
            missed, wrong = errors(objects, answer, least)
            words = f"{len(objects.boxes)} objects, {missed} missed, {wrong} wrong"
            pixels = in_own_size(image, scene.size, scene.own)
            picture = _joined(*side_by_side(pixels, scene.objects, answer, meter.classes, least))
            share = (missed + wrong) / max(len(objects.boxes), 1)
            found.append((share, scene.place, words, picture))
        found.sort(key=lambda entry: entry[:2], reverse=True)
        del found[_EACH:-_EACH]
    worst, best = (found[:_EACH], found[: -_EACH - 1 : -1]) if len(found) > _EACH else (found, [])
    shown = [_of_classes(meter, counts)]
    for title, part in (("Images where it errs most", worst), ("Images where it errs least", best)):
        pictures = [(picture, f"{source.name(place)}: {words}") for _, place, words, picture in part]
        if pictures:
            told = f"The objects, and what is found with a score of {least:g} or more."
            shown.append(Shown(title, told, pictures=pictures))
    return shown


def errors(objects: Objects, answer: Mapping[str, Any], least: float) -> tuple[int, int]:
    """How many objects are missed, and how many detections of a score of `least` or more are of no object.

    A detection is of the object of its class that it overlaps most, from 0.5 on; the surest takes it.
    """
    kept = torch.where(answer["scores"] >= least)[0]
    boxes, labels = answer["boxes"][kept], answer["labels"][kept]
    overlaps = box_iou(boxes, objects.boxes) * (labels[:, None] == objects.labels)
    taken: set[int] = set()
    for row in overlaps:
        free = [place for place in row.argsort(descending=True).tolist() if place not in taken]
        if free and row[free[0]] >= _OVERLAP:
            taken.add(free[0])
    return len(objects.boxes) - len(taken), len(boxes) - len(taken)


def _of_classes(meter: AveragePrecision, counts: Counter[int]) -> Shown:
    each = meter.each(meter.evaluated())
    place = {name: label for label, name in enumerate(meter.classes)}
    rows = [
        (name, value / 100, f"{value:.1f} %", counts[place[name]])
        for name, value in sorted(each.items(), key=lambda entry: entry[1])
    ]
    return Shown("Classes", "The least known first.", ("class", "", "AP", "objects"), rows, shares=(1,))


def _joined(*parts: Any) -> Image.Image:
    """Pictures `(3, H, W)` side by side, small enough for a page."""
    images = [to_pil_image(part) for part in parts]
    for image in images:
        image.thumbnail((_WIDE, _WIDE))
    whole = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width
    return whole
