"""Scores of a model on batches of images."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError

from ._device import autocast
from ._images import Batch, Normalise


class Scores(NamedTuple):
    """Percent of images whose class is the first, or among the first five; mean loss; what was counted."""

    top1: float
    top5: float
    loss: float
    images: int
    bad: list[str]


@torch.inference_mode()
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    normalise: Normalise,
    dtype: torch.dtype | None,
    after_batch: Callable[[Batch], None] = lambda batch: None,
) -> Scores:
    """Evaluate `model`, which is left in evaluation mode."""
    model.eval()
    first = fifth = images = 0
    loss = 0.0
    bad: list[str] = []
    for batch in batches:
        bad += batch.bad
        if len(batch.targets):
            with autocast(normalise.device, dtype):
                logits = model(normalise(batch.images))
            targets = batch.targets.to(normalise.device)
            hits = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
            first += int(hits[:, 0].sum())
            fifth += int(hits.sum())
            loss += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
            images += len(targets)
        after_batch(batch)
    if not images:
        raise LinsightError(f"no image could be read: {bad[0] if bad else 'there is none'}")
    return Scores(100 * first / images, 100 * fifth / images, loss / images, images, bad)


@torch.inference_mode()
def probabilities(model: nn.Module, images: Tensor, normalise: Normalise, dtype: torch.dtype | None) -> Tensor:
    """uint8 `(B, C, H, W)` -> class probabilities `(B, classes)`, on the CPU."""
    model.eval()
    with autocast(normalise.device, dtype):
        return model(normalise(images)).float().softmax(-1).cpu()
