"""Parts of a run's page on segmentation: each class, and the images where the model does worst and best."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image

from linsight.data.images import Batch
from linsight.data.sources import Source

from ._masks_drawn import side_by_side
from .overlap import Overlap
from .task import Shown

_EACH = 6  # images where it does best, and as many where it does worst


def page_of(
    classes: Sequence[str], source: Source, batches: Iterable[Batch], answers: Callable[[Batch], Any]
) -> list[Shown]:
    """The parts. answers: logits `(K, h, w)` of each image of a batch, in the size of its mask."""
    meter, found = Overlap(len(classes)), list[tuple[float, int, Image.Image]]()
    for batch in batches:
        for place, logits in enumerate(answers(batch) if len(batch.images) else ()):
            target, image = batch.targets[place], batch.images[place]
            own = Overlap(len(classes))
            own.update([logits], Batch(batch.images, [target], []))
            meter.merge_state(own)
            overlap = own.compute()["miou"]
            if not math.isnan(overlap):
                seen = image[:, : target.size[0], : target.size[1]]
                found.append((overlap, target.place, side_by_side(seen, target.mask, logits.argmax(0), len(classes))))
        found.sort(key=lambda entry: entry[:2])
        del found[_EACH:-_EACH]
    worst, best = (found[:_EACH], found[: -_EACH - 1 : -1]) if len(found) > _EACH else (found, [])
    shown = [_of_classes(classes, meter)]
    for title, part in (("Images where it does worst", worst), ("Images where it does best", best)):
        pictures = [(picture, f"{source.name(place)}: mIoU {overlap:.1f} %") for overlap, place, picture in part]
        if pictures:
            shown.append(Shown(title, "The image, its mask, and what is predicted.", pictures=pictures))
    return shown


def _of_classes(classes: Sequence[str], meter: Overlap) -> Shown:
    overlaps, accuracies = (values.tolist() for values in meter.each())
    shares = (meter.counts.sum(1) / meter.counts.sum().clamp(min=1)).tolist()
    rows = [
        (name, overlap / 100, f"{overlap:.1f} %", "" if math.isnan(accuracy) else f"{accuracy:.1f} %", f"{share:.2%}")
        for overlap, name, accuracy, share in sorted(zip(overlaps, classes, accuracies, shares, strict=True))
        if not math.isnan(overlap)
    ]
    return Shown(
        "Classes", "The least known first.", ("class", "", "IoU", "accuracy", "of all pixels"), rows, shares=(1,)
    )
