"""The task `segment`: a class for each pixel of an image."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.data.datasets import Data
from linsight.data.dense import MaskSamples, collate, open_evaluated_masks, open_masks
from linsight.data.images import Batch, Samples
from linsight.data.masks import NONE, values_of
from linsight.data.sources import Source
from linsight.errors import LinsightError
from linsight.models.dense import create_segmenter
from linsight.recipe import Recipe

from ._dense_losses import balanced, cross_entropy, dice
from ._masks_drawn import draw_masks, write_masks
from ._segment_page import page_of
from .building import built
from .meters import Meter
from .overlap import Overlap
from .records import SegmentRecipe
from .task import Column, Shown, Student, Task

_COUNTED = 200  # images of which the pixels of classes are counted


@dataclasses.dataclass(frozen=True)
class Segmented:
    """The classes of the pixels of an image file, largest first, with their shares of it.

    mask: `(H, W)` of uint8, or int16 where there are more than 256 classes: the place of the class of each pixel.
    """

    file: str
    classes: tuple[str, ...]
    shares: tuple[float, ...]
    mask: Any = dataclasses.field(repr=False, compare=False)


class Segment(Task):
    """See the module. `facts["classes"]` are the names of the classes, in the order of the logits."""

    name = "segment"
    about = "a class for each pixel"
    record: ClassVar[type[Recipe]] = SegmentRecipe
    best = "miou"
    writes = "masks"
    streamed = "mask"
    exported = "segment"
    at_once = 4  # their logits are of every pixel
    columns = (
        Column("miou", "mIoU", ".2f", "%"),
        Column("macc", "mean accuracy of classes", ".2f", "%"),
        Column("pixels", "pixel accuracy", ".2f", "%"),
    )

    # Images

    def open(self) -> Data:
        """See `Task`."""
        data = open_masks(self.recipe)
        self.facts = {"classes": data.classes}
        if self.recipe.class_weights == "balanced":
            self.facts["weights"] = [round(weight, 6) for weight in balanced(_pixels(data.train)).tolist()]
        return data

    def open_evaluation(self, split: str | None, *, in_order: bool = False) -> Source:
        """See `Task`."""
        return open_evaluated_masks(self.recipe, split, self.classes)

    def samples(self, source: Source, size: tuple[int, int] | None, *, training: bool) -> MaskSamples:
        """See `Task`: images to evaluate are as large as `eval_side` says."""
        return MaskSamples(source, self.recipe, size if training else None)

    @staticmethod
    def collate(samples: list[Any]) -> Batch:
        """See `Task`."""
        return collate(samples)

    # The model

    def build(self) -> nn.Module:
        """See `Task`."""
        recipe = self.recipe
        return built(
            recipe,
            self.outputs,
            lambda name, **arguments: create_segmenter(
                name, recipe.decoder, width=recipe.decoder_width or None, **arguments
            ),
        )

    # What it learns

    def begin(self, device: torch.device) -> None:
        """See `Task`."""
        super().begin(device)
        weights = self.facts.get("weights")
        self.weights = None if weights is None else torch.tensor(weights, device=device)

    def loss(self, student: Student, batch: Batch, epoch: int) -> tuple[Tensor, int] | None:
        """See `Task`."""
        if not len(batch.targets):
            return None
        images = self.inputs(batch.images)
        classes = torch.stack([target.mask for target in batch.targets]).to(images.device, torch.long)
        main, auxiliary = student.forward(images)
        loss = self._judged(main, classes)
        if auxiliary is not None and self.recipe.auxiliary:
            loss = loss + self.recipe.auxiliary * self._judged(auxiliary, classes)
        return loss, len(images)

    def _judged(self, logits: Tensor, classes: Tensor) -> Tensor:
        recipe = self.recipe
        more = {"weights": self.weights, "hardest": recipe.ohem, "smoothing": recipe.smoothing}
        loss = cross_entropy(logits, classes, **more)
        return loss + recipe.dice * dice(logits, classes) if recipe.dice else loss

    # How well it does it

    def measure(self) -> Meter:
        """See `Task`."""
        return Overlap(len(self.classes))

    def answers(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """Logits `(K, h, w)` of each image, in its own size."""
        images, sizes = self.inputs(batch.images), {target.size for target in batch.targets}
        if len(sizes) == 1:
            found = self.answer(model, images).split(1)
        else:
            parts = zip(images, (target.size for target in batch.targets), strict=True)
            found = tuple(self.answer(model, image[None, :, :height, :width]) for image, (height, width) in parts)
        return [
            (F.interpolate(one.float(), target.own, mode="bilinear") if target.own != target.size else one)[0]
            for one, target in zip(found, batch.targets, strict=True)
        ]

    def answer(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits `(B, K, h, w)`; of windows, their mean where they overlap."""
        recipe = self.recipe
        if recipe.eval_mode == "whole":
            return model(inputs)
        side = (recipe.img_size * 2)[:2]
        if not side:
            raise LinsightError("eval_mode=slide needs img_size, the height and width of a window")
        total, seen = None, torch.zeros(inputs.shape[-2:], device=inputs.device)
        for rows, columns in _windows((inputs.shape[-2], inputs.shape[-1]), side, recipe.eval_stride):
            part = model(inputs[..., rows, columns]).float()
            if total is None:
                total = part.new_zeros(*part.shape[:2], *inputs.shape[-2:])
            total[..., rows, columns] += part
            seen[rows, columns] += 1
        assert total is not None, "there is a window"
        return total / seen

    # What is shown of it

    def draw(self, path: pathlib.Path, samples: Any, answers: Callable[[Batch], Any]) -> None:
        """See `Task`."""
        draw_masks(path, samples, answers, self.classes)

    def examine(self, samples: Samples, batches: Iterable[Batch], answers: Callable[[Batch], Any]) -> Sequence[Shown]:
        """See `Task`: each class, and the images where it does worst and best."""
        return page_of(self.classes, samples.source, batches, answers)

    def places(self, batch: Batch) -> list[int]:
        """See `Task`."""
        return [target.place for target in batch.targets]

    def predictions(self, answers: Any, files: Sequence[str], top: int) -> list[Segmented]:
        """See `Task`."""
        kind = torch.uint8 if len(self.classes) <= 256 else torch.int16
        return [
            self.of_stream(logits.argmax(0).to(kind), file, top) for logits, file in zip(answers, files, strict=True)
        ]

    def of_stream(self, answer: Tensor, file: str, top: int) -> Segmented:
        """See `Task`."""
        counts = sum(torch.bincount(row.int(), minlength=len(self.classes)) for row in answer)  # as rows: of any size
        assert isinstance(counts, Tensor)
        order = [place for place in counts.argsort(descending=True).tolist() if counts[place]][:top]
        shares = tuple(float(counts[place] / answer.numel()) for place in order)
        return Segmented(file, tuple(self.classes[place] for place in order), shares, answer.numpy())

    def table(self, found: Sequence[Segmented]) -> tuple[list[str], list[list[str]]]:
        """See `Task`."""
        rows = [
            ["" if rank else entry.file, name, f"{100 * share:.1f} %"]
            for entry in found
            for rank, (name, share) in enumerate(zip(entry.classes, entry.shares, strict=True))
        ]
        return ["file", "class", "share of the image"], rows

    def told(self, found: Segmented) -> dict[str, Any]:
        """See `Task`: all but the mask."""
        return {"file": found.file, "classes": found.classes, "shares": found.shares}

    def write(self, found: Sequence[Segmented], folder: pathlib.Path) -> list[pathlib.Path]:
        """See `Task`: for each image NAME.png, whose values are those of the masks that it learned by, with colours."""
        return write_masks(folder, found, values_of(self.classes, self.recipe.ignore))


def _windows(size: tuple[int, int], side: tuple[int, int], stride: float) -> Iterator[tuple[slice, slice]]:
    """Windows that cover an image, each inside of it."""
    spans = []
    for whole, part in zip(size, side, strict=True):
        part = min(part, whole)
        starts = [*range(0, whole - part, max(int(part * stride), 1)), whole - part]
        spans.append([slice(start, start + part) for start in dict.fromkeys(starts)])
    for rows in spans[0]:
        for columns in spans[1]:
            yield rows, columns


def _pixels(source: Source) -> list[int]:
    """How many pixels of each class there are, in images spread over a source."""
    total = len(source)
    counts = torch.zeros(len(source.classes), dtype=torch.long)
    for place in range(min(_COUNTED, total)):
        mask = torch.from_numpy(source.beside(place * total // min(_COUNTED, total)))
        counts += torch.bincount(mask[mask != NONE].long(), minlength=len(counts))
    return counts.tolist()
