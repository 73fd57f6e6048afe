"""Losses that layers have beside that of the task, as those by which heads are used alike.

A layer tells its own in training mode, by `add_loss`, and who trains collects them around the forward pass:

    with collect_losses() as own:
        loss = criterion(model(images), targets)
    loss = own.added_to(loss)

Outside of such a context they go nowhere. Layers keep none of them, so that they can be copied and pickled.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_OPEN: list[list[tuple[str, Tensor, float]]] = []  # a list for each context, the innermost last


class LayerLosses:
    """The losses of the layers of one forward pass: their kind, their value, and the weight of the kind."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Tensor, float]] = []

    def by_kind(self) -> dict[str, Tensor]:
        """The mean of each kind over the layers that told one, times its weight."""
        kinds: dict[str, list[Tensor]] = {}
        for kind, value, weight in self.told:
            kinds.setdefault(kind, []).append(weight * value)
        return {kind: sum(values[1:], values[0]) / len(values) for kind, values in kinds.items()}

    def added_to(self, loss: Tensor) -> Tensor:
        """`loss` and these."""
        return sum((value.to(loss.dtype) for value in self.by_kind().values()), loss)


@contextmanager
def collect_losses() -> Iterator[LayerLosses]:
    """Collect what layers in training mode tell inside of this context; one in another context tells that one."""
    losses = LayerLosses()
    _OPEN.append(losses.told)
    try:
        yield losses
    finally:
        _OPEN.pop()


def add_loss(kind: str, value: Tensor, weight: float) -> None:
    """Tell a loss of a layer, a scalar, to the innermost `collect_losses`; to nobody where there is none.

    kind: losses of one kind are averaged over the layers.
    weight: of the kind, beside the loss of the task.
    """
    if _OPEN:
        _OPEN[-1].append((kind, value, weight))
