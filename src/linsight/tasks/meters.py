"""The meters of tasks: torchmetrics, whose states add up batch by batch and over processes. Kept on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from linsight.data.images import Batch

from .exits import Scored


class Accuracy(Metric):
    """Percent of images whose class is the first, or among the first five, and the mean loss."""

    hits: Tensor
    loss: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros(2, dtype=torch.long), "sum")
        self.add_state("loss", torch.zeros((), dtype=torch.double), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), "sum")

    def update(self, logits: Tensor, batch: Batch) -> None:
        """logits: `(B, classes)`."""
        targets = batch.targets.to(logits.device)
        hits = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
        self.hits += torch.stack([hits[:, 0].sum(), hits.sum()]).cpu()
        self.loss += F.cross_entropy(logits.float(), targets, reduction="sum").cpu()
        self.images += len(targets)

    def compute(self) -> dict[str, float]:
        """`top1` and `top5` in percent, and `loss`."""
        count = int(self.images)
        first, fifth = (100 * hits / count for hits in self.hits.tolist())
        return {"loss": float(self.loss) / count, "top1": first, "top5": fifth}


class Exits(Metric):
    """The answers of each exit: accuracies, and `scored` for policies."""

    confidences: list[Tensor]
    correct: list[Tensor]
    targets: list[Tensor]
    loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("confidences", "correct", "targets"):
            self.add_state(name, [], "cat")
        self.add_state("loss", torch.zeros((), dtype=torch.double), "sum")

    def update(self, logits: Sequence[Tensor], batch: Batch) -> None:
        """logits: of each exit, `(B, classes)`."""
        answers = [exit.float().cpu() for exit in logits]
        best = [exit.softmax(1).max(1) for exit in answers]
        self.confidences.append(torch.stack([values for values, _ in best], 1))
        self.correct.append(torch.stack([indices == batch.targets for _, indices in best], 1))
        self.targets.append(batch.targets)
        self.loss += F.cross_entropy(answers[-1], batch.targets, reduction="sum")

    def scored(self) -> tuple[Scored, list[int]]:
        """The answers, and the classes of the images."""
        both = (torch.cat(list(part)) for part in (self.confidences, self.correct))
        return Scored(*both), torch.cat(list(self.targets)).tolist()

    def compute(self) -> dict[str, float]:
        """`top1` of the last exit and `exit1` ... of each one, in percent; `loss` of the last one."""
        scored, targets = self.scored()
        tops = scored.accuracies()
        each = {f"exit{number}": top1 for number, top1 in enumerate(tops, 1)}
        return {"loss": float(self.loss) / len(targets), "top1": tops[-1], **each}
