"""The check of an exported file: its answers beside the model's own, at sizes and batches that the export never saw."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from linsight.errors import LinsightError

TOLERANCE = 1e-4  # of the largest number that the model answers
Run = Callable[[Tensor], Sequence[Tensor]]


class Checked(NamedTuple):
    """One comparison: the shape of the input, and the largest error as a share of the largest number."""

    shape: tuple[int, ...]
    error: float


class Exported(NamedTuple):
    """A file that was written and checked."""

    path: Path
    form: str
    checks: tuple[Checked, ...]

    @property
    def error(self) -> float:
        """The largest error of all checks, as a share of the largest number."""
        return max(check.error for check in self.checks)


def unseen(batch: int, size: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
    """Batches and sizes to check at: one image, oblong; more images, smaller and odd; as many, a prime by a round one."""
    height, width = size
    return (
        (1, height + height // 3 + 1, width),
        (batch + 1, max(1, height - height // 4 - 1), width + 17),
        (batch, height + 3, max(1, width // 2 + 1)),
    )


def compare(model: nn.Module, run: Run, inputs: Sequence[Tensor], tolerance: float, form: str) -> tuple[Checked, ...]:
    """The errors of `run` on `inputs`, beside those of the model.

    Raises:
        LinsightError: it fails, or one of them exceeds `tolerance`.
    """
    checks = []
    for x in inputs:
        with torch.no_grad():
            wanted = tree_leaves(model(x))
        try:
            found = run(x)
        except Exception as error:  # of another library: whatever it raises, the file is of no use
            reason = " ".join(str(error).split())[:300]
            raise LinsightError(f"{form} fails on {_shape(x)}, which the model takes: {reason}") from error
        worst = max(_error(*pair) for pair in zip(found, wanted, strict=True))
        if not worst <= tolerance:
            raise LinsightError(
                f"{form} answers {_shape(x)} otherwise than the model, off by {worst:.1e} of its largest number: "
                f"refused; --static exports for one size"
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


def _error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    largest = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - wanted.double()).abs().max() / largest)


def _shape(x: Tensor) -> str:
    return "x".join(map(str, x.shape))
