"""The meters of tasks, whose sums are kept on the CPU."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.data.images import Batch

from .exits import Scored


class Meter(Protocol):
    """A meter of a model, counting batch by batch. A metric of torchmetrics that takes a batch is one, too.

    It can be pickled: each of several processes counts its images.
    """

    def update(self, outputs: Any, batch: Batch) -> None:
        """Count the outputs of a batch in."""

    def compute(self) -> dict[str, float]:
        """Measures by name."""

    def merge_state(self, other: Any) -> None:
        """Count in what another meter of the kind has counted, of other images."""


class Accuracy:
    """Percent of images whose class is the first, or among the first five, and the mean loss."""

    def __init__(self) -> None:
        self.first = self.fifth = self.images = 0
        self.loss = 0.0

    def update(self, logits: Tensor, batch: Batch) -> None:
        """logits: `(B, classes)`."""
        targets = batch.targets.to(logits.device)
        hits = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
        self.first += int(hits[:, 0].sum())
        self.fifth += int(hits.sum())
        self.loss += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
        self.images += len(targets)

    def merge_state(self, other: "Accuracy") -> None:
        """See `Meter`."""
        for name in ("first", "fifth", "loss", "images"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def compute(self) -> dict[str, float]:
        """`top1` and `top5` in percent, and `loss`."""
        first, fifth = (100 * hits / self.images for hits in (self.first, self.fifth))
        return {"loss": self.loss / self.images, "top1": first, "top5": fifth}


class Exits:
    """The answers of each exit: accuracies, and `scored` for policies."""

    def __init__(self) -> None:
        self.confidences: list[Tensor] = []
        self.correct: list[Tensor] = []
        self.targets: list[int] = []
        self.loss = 0.0

    def update(self, logits: Sequence[Tensor], batch: Batch) -> None:
        """logits: of each exit, `(B, classes)`."""
        answers = [exit.float().cpu() for exit in logits]
        best = [exit.softmax(1).max(1) for exit in answers]
        self.confidences.append(torch.stack([values for values, _ in best], 1))
        self.correct.append(torch.stack([indices == batch.targets for _, indices in best], 1))
        self.targets += batch.targets.tolist()
        self.loss += float(F.cross_entropy(answers[-1], batch.targets, reduction="sum"))

    def merge_state(self, other: "Exits") -> None:
        """See `Meter`."""
        self.confidences += other.confidences
        self.correct += other.correct
        self.targets += other.targets
        self.loss += other.loss

    def scored(self) -> tuple[Scored, list[int]]:
        """The answers, and the classes of the images."""
        return Scored(torch.cat(self.confidences), torch.cat(self.correct)), self.targets

    def compute(self) -> dict[str, float]:
        """`top1` of the last exit and `exit1` ... of each one, in percent; `loss` of the last one."""
        scored, targets = self.scored()
        tops = scored.accuracies()
        each = {f"exit{number}": top1 for number, top1 in enumerate(tops, 1)}
        return {"loss": self.loss / len(targets), "top1": tops[-1], **each}
