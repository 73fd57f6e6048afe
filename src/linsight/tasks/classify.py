"""The task `classify`: one class for each image."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.data.datasets import Data, open_data, open_evaluation, under
from linsight.data.images import Batch, Samples
from linsight.data.sources import Source
from linsight.errors import LinsightError
from linsight.recipe import Recipe

from ._guesses import guesses, predictions
from .meters import Accuracy, Meter
from .records import ClassifyRecipe
from .task import Column, Student, Task

Criterion = Callable[[Tensor, Tensor], Tensor]  # of logits and targets


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image file, best first, with their probabilities."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class Classify(Task):
    """See the module. `facts["classes"]` are the names of the classes, in the order of the logits.

    A model whose loss is not that of one set of logits has `training_loss(outputs, targets, criterion) -> Tensor`, with
    what its forward gives in training mode, in the dtype of mixed precision, and `criterion(logits, targets)`, the
    recipe's loss. In evaluation mode it gives logits like any other.
    """

    name = "classify"
    about = "one class for each image"
    record: ClassVar[type[Recipe]] = ClassifyRecipe
    best = "top1"
    sorts = True

    def open(self) -> Data:
        """See `Task`."""
        data = open_data(self.recipe)
        self.facts = {"classes": data.classes}
        return data

    def open_evaluation(self, split: str | None, *, in_order: bool = False) -> Source:
        """See `Task`."""
        return open_evaluation(self.recipe, split, self.classes, in_order=in_order)

    def open_again(self) -> Source:
        """See `Task`."""
        return under(open_data(self.recipe).val, self.classes, self.recipe.data)

    def begin(self, device: torch.device) -> None:
        """See `Task`."""
        super().begin(device)
        recipe = self.recipe
        self.erase = RandomErasing(recipe.re_prob, mode=recipe.re_mode, device=str(device))
        self.mix: Mixup | None = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(
                recipe.mixup,
                recipe.cutmix,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob,
                label_smoothing=recipe.smoothing,
                num_classes=recipe.num_classes or self.outputs,
            )

    def check(self, model: nn.Module) -> None:
        """See `Task`."""
        if self.recipe.mesa and hasattr(model, "training_loss"):
            name = self.recipe.model
            raise LinsightError(f"mesa needs a model with one set of logits: '{name}' has a loss of its own")

    def usable(self, count: int) -> int:
        """See `Task`: pairs only, where they are mixed. Images that could not be read may leave an odd number."""
        return count - count % 2 if self.mix else count

    def loss(self, student: Student, batch: Batch, epoch: int) -> tuple[Tensor, int] | None:
        """See `Task`."""
        recipe = self.recipe
        if not len(batch.targets):
            return None
        images = self.inputs(batch.images)
        targets = batch.targets.to(images.device, non_blocking=True)
        images, targets = images[: self.usable(len(images))], targets[: self.usable(len(targets))]
        if not len(images):
            return None
        if recipe.re_prob:
            images = self.erase(images)
        smoothing = recipe.smoothing
        if self.mix:
            images, targets = self.mix(images, targets)
            smoothing = 0.0  # mixed targets have it in them

        def criterion(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

        outputs = student.forward(images)
        loss = self.judged(student, outputs, images, targets, criterion)
        if recipe.mesa and epoch >= int(recipe.mesa_start * recipe.epochs):
            # MESA (Du et al., NeurIPS 2022)
            taught = student.taught(images).float().softmax(-1)
            loss = loss + recipe.mesa * F.cross_entropy(self.logits(outputs).float(), taught)
        return loss, len(images)

    def judged(self, student: Student, outputs: Any, images: Tensor, targets: Tensor, criterion: Criterion) -> Tensor:
        """The mean loss of what the student made of images, as it was given them. criterion: the recipe's loss."""
        own = getattr(student.model, "training_loss", None)
        return criterion(outputs, targets) if own is None else own(outputs, targets, criterion)

    def logits(self, outputs: Any) -> Tensor:
        """The logits `(B, classes)` among what the student answers in training."""
        return outputs

    def measure(self) -> Meter:
        """See `Task`."""
        return Accuracy()

    @property
    def columns(self) -> Sequence[Column]:
        """See `Task`. Of five classes the first five are all."""
        fifth = [Column("top5", "top-5", ".2f", "%")] if (self.recipe.num_classes or self.outputs) > 5 else []
        return [Column("top1", "top-1", ".2f", "%"), *fifth]

    def draw(self, path: pathlib.Path, samples: Samples, answers: Callable[[Batch], Tensor]) -> None:
        """See `Task`."""

        def shares(images: Tensor) -> Tensor:
            return answers(Batch(images, torch.zeros(len(images), dtype=torch.long), [])).softmax(-1)

        found = guesses(samples, self.classes, shares)
        if found:
            predictions(path, found)

    def predictions(self, answers: Tensor, files: Sequence[str], top: int) -> list[Prediction]:
        """See `Task`."""
        best = answers.softmax(-1).sort(descending=True)
        names = dict(enumerate(self.facts.get("titles") or self.classes))
        top = min(top, len(names))
        return [
            Prediction(
                file,
                tuple(names.get(index, str(index)) for index in indices[:top].tolist()),
                tuple(values[:top].tolist()),
            )
            for file, values, indices in zip(files, *best, strict=True)
        ]

    def table(self, found: Sequence[Prediction]) -> tuple[list[str], list[list[str]]]:
        """See `Task`."""
        rows = [
            ["" if rank else entry.file, label, f"{100 * value:.1f} %"]
            for entry in found
            for rank, (label, value) in enumerate(zip(entry.classes, entry.probabilities, strict=True))
        ]
        return ["file", "class", "probability"], rows
