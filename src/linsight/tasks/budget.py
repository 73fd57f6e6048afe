"""The task `budget`: classes by a model with exits, where easy images leave early."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.models.hosts.dyn_perceiver import DynamicPerceiver
from linsight.recipe import Recipe

from .classify import Classify
from .meters import Exits, Meter
from .records import BudgetRecipe
from .task import Column


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

    def measure(self) -> Meter:
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
