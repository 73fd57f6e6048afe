"""The task `budget`: classes by a model with exits, where easy images leave early."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from linsight.data.images import Batch
from linsight.errors import LinsightError
from linsight.models.hosts.dyn_perceiver import DynamicPerceiver
from linsight.recipe import Recipe

from .classify import Classify
from .exits import Scored
from .records import BudgetRecipe
from .task import Column


class Exits(Metric):
    """What each exit answers: accuracies, and `scored` for policies."""

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


class Budget(Classify):
    """See the module. It is trained as `classify` is, and every exit is measured."""

    name = "budget"
    about = "classes by a model with exits, each of which is measured"
    record: ClassVar[type[Recipe]] = BudgetRecipe

    def check(self, model: nn.Module) -> None:
        """See `Task`."""
        super().check(model)
        require_exits(model, self.recipe.model)

    def answer(self, model: nn.Module, inputs: Tensor) -> Any:
        """See `Task`: the logits of each exit."""
        return [found.logits for found in model.exits(inputs)]  # type: ignore[operator]

    def measure(self) -> Metric:
        """See `Task`."""
        return Exits()

    @property
    def columns(self) -> Sequence[Column]:
        """See `Task`."""
        exits = range(1, 5)
        return [Column("top1", "top-1", ".2f", "%"), *(Column(f"exit{n}", f"exit {n}", ".2f", "%") for n in exits)]


def require_exits(model: nn.Module, name: str) -> None:
    """Raise a LinsightError where a model has no exits."""
    if not isinstance(model, DynamicPerceiver):
        raise LinsightError(f"'{name}' has no exits to stop at: a budget is for models that have, as dynp_*")
