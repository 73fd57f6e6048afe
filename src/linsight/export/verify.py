"""The check of an exported file: its answers beside the model's own, at sizes and batches that the export never saw."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from linsight.errors import LinsightError

from .facts import Facts
from .runs import one_line

TOLERANCE = 1e-4  # of the largest number that the model answers
PIXELS = 1e-3  # where the graph rounds to whole pixels, of which one may fall on the other side
OBJECTS = 1e-3  # of a detector, whose boxes are exponentials, moved and pooled again
Run = Callable[[Tensor], Any]
Measure = Callable[[list[Tensor], list[Tensor]], float]  # of what was found and what was wanted


class Checked(NamedTuple):
    """One comparison: the shape of the input, and the largest error as a share of the largest number."""

    shape: tuple[int, ...]
    error: float


class Exported(NamedTuple):
    """A file that was written and checked.

    limit: the largest error that would have been accepted.  float32: nodes of a half-precision file that stay in it.
    facts: what the file says of itself.
    """

    path: Path
    form: str
    checks: tuple[Checked, ...]
    limit: float = TOLERANCE
    float32: tuple[str, ...] = ()
    facts: Facts = Facts()

    @property
    def error(self) -> float:
        """The largest error of all checks, as a share of the largest number."""
        return max(check.error for check in self.checks)


def unseen(batch: int, size: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
    """Batches and sizes to check at: one image, of twice the height; more images, smaller and odd; as many, narrow."""
    height, width = size
    return (
        (1, 2 * height + 1, width),
        (batch + 1, max(1, height - height // 4 - 1), width + 17),
        (batch, height + 3, max(1, width // 2 + 1)),
    )


def answers(model: Run, x: Tensor) -> list[Tensor]:
    """The tensors that a model gives.

    Raises:
        LinsightError: it does not take the input, or gives a number that is none: nothing can be compared with it.
    """
    try:
        with torch.no_grad():
            found: list[Tensor] = tree_leaves(model(x))
    except Exception as error:  # the model may be anybody's
        raise LinsightError(f"the model itself does not take {_shape(x)}: {one_line(error)}") from error
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise LinsightError(
            f"the model itself answers {_shape(x)} in {str(x.dtype).removeprefix('torch.')} with what is no number: "
            f"nothing can be compared with that"
        )
    return found


def error_of(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest error of some tensors, each as a share of the largest number of its own; of classes, of how many."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in wanted]:
        return float("inf")
    errors = [_error(*pair) for pair in zip(found, wanted, strict=True) if pair[1].numel()]
    return float(torch.tensor([0.0, *errors]).max())  # nan stays nan


def _error(found: Tensor, wanted: Tensor) -> float:
    if not wanted.is_floating_point():
        return float((found != wanted).double().mean())
    largest = wanted.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - wanted.double()).abs().max() / largest)


def compare(
    model: Run,
    run: Run,
    inputs: Sequence[tuple[Tensor, Tensor]],
    tolerance: float,
    form: str,
    static: bool = False,
    measure: Measure = error_of,
) -> tuple[Checked, ...]:
    """The errors of `run` beside the model, at pairs of inputs: the model's, and the same in the dtype of the file.

    Raises:
        LinsightError: it fails, or one of them exceeds `tolerance`.
    """
    checks = []
    way = "" if static else "; --static exports for one size"
    for x, given in inputs:
        wanted = answers(model, x)
        try:
            found: list[Tensor] = tree_leaves(run(given))
        except Exception as error:  # of another library: whatever it raises, the file is of no use
            raise LinsightError(
                f"{form} fails on {_shape(x)}, which the model takes: {one_line(error)}{way}"
            ) from error
        worst = measure(found, wanted)
        if not worst <= tolerance:
            raise LinsightError(
                f"{form} answers {_shape(x)} otherwise than the model, off by {worst:.1e} of its largest number: "
                f"refused{way}"
            )
        checks.append(Checked(tuple(x.shape), worst))
    return tuple(checks)


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode, without gradients, for the moment."""
    before = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in before.items():
            module.training = training


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))
