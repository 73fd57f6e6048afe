"""How well classes of pixels agree with the truth: a meter of the overlap of each class."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from linsight.data.images import Batch
from linsight.data.masks import NONE


class Overlap:
    """The pixels of each class (rows) that are taken for each (columns), summed over images, and their mean loss.

    It counts in the size in which a mask is kept.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.long)
        self.loss = 0.0

    def update(self, answers: list[Tensor], batch: Batch) -> None:
        """answers: logits `(K, h, w)` of each image."""
        for logits, target in zip(answers, batch.targets, strict=True):
            whole = logits[None].float()
            truth = target.mask.to(whole.device, torch.long)[None]
            self.loss += float(F.cross_entropy(whole, truth, ignore_index=NONE, reduction="sum"))
            self.counts += multiclass_confusion_matrix(
                whole.argmax(1), truth, len(self.counts), ignore_index=NONE, validate_args=False
            ).cpu()

    def merge_state(self, other: "Overlap") -> None:
        """See `Meter`."""
        self.counts += other.counts
        self.loss += other.loss

    def each(self) -> tuple[Tensor, Tensor]:
        """The intersection over union, and the accuracy, of each class in percent `(K,)`; NaN where it is not there."""
        hits = self.counts.diag().double()
        truths, guesses = self.counts.sum(1), self.counts.sum(0)
        return 100 * hits / (truths + guesses - hits), 100 * hits / truths

    def compute(self) -> dict[str, float]:
        """`miou` and `macc`, means over the classes that are there, `pixels` and `loss`."""
        overlap, accuracy = self.each()
        total = self.counts.sum().double()
        return {
            "loss": self.loss / float(total.clamp(min=1)),
            "miou": float(overlap.nanmean()),
            "macc": float(accuracy.nanmean()),
            "pixels": float(100 * self.counts.diag().sum() / total),
        }
