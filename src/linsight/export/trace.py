"""What every export needs: the model in evaluation mode, an example, free dimensions, inputs to check with."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.fuse import fused

from .files import Facts
from .verify import evaluation, unseen

T = TypeVar("T")
_BATCH = 2  # of the example: one image would be taken for a constant


class Traced(NamedTuple):
    """A model ready to be exported.

    example: the input that it is traced with.  dims: its free dimensions by number, {} for none.
    inputs: others to check with, of other batches and sizes where these are free.
    """

    model: nn.Module
    facts: Facts
    example: Tensor
    dims: dict[int, Any]
    inputs: tuple[Tensor, ...]

    def attempt(self, form: str, export: Callable[[], T]) -> T:
        """What `export` gives.

        Raises:
            LinsightError: it raised, in one line.
        """
        try:
            return export()
        except LinsightError:
            raise
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            way = "; --static exports for one size" if self.dims else ""
            raise LinsightError(f"'{self.facts.model}' has no {form} form: {reason.strip()[:300]}{way}") from error


@contextlib.contextmanager
def traced(model: nn.Module, facts: Facts | None) -> Iterator[Traced]:
    """The forms for inference of `model`, which stays as it is, with what to trace and check them with."""
    facts = facts or facts_of(model)
    channels, *size = facts.input_size
    height, width = size

    def images(batch: int, height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch + height + width)
        if facts.pixels:
            return torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8, generator=generator)
        return torch.randn(batch, channels, height, width, generator=generator).to(_dtype(model))

    names = {0: "batch", 1: "height", 2: "width"} if facts.pixels else {0: "batch", 2: "height", 3: "width"}
    dims = {dim: torch.export.Dim(name) for dim, name in names.items()} if facts.dynamic else {}
    shapes = unseen(_BATCH, (height, width)) if facts.dynamic else [(_BATCH, height, width)]
    inputs = tuple(images(*shape) for shape in shapes)
    with evaluation(model):
        yield Traced(fused(model), facts, images(_BATCH, height, width), dims, inputs)


def facts_of(model: nn.Module) -> Facts:
    """What a model says of itself by its `pretrained_cfg`."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(cfg.get("input_size", (3, 224, 224)))
    return Facts(
        str(cfg.get("architecture", type(model).__name__)),
        (),
        size,
        tuple(cfg.get("mean", ())),
        tuple(cfg.get("std", ())),
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
