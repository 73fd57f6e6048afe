"""The batches of a run: what it trains on and what it is evaluated on."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from linsight.errors import LinsightError
from linsight.recipe import Recipe

from .datasets import Data
from .images import Batch, Samples, cached, loader, told
from .random import Batches
from .sources import Source


@dataclasses.dataclass(frozen=True)
class Feeds:
    """Loaders to iterate once an epoch; `order` says from which epoch and step.

    lost: what was wrong with images that were left out when all were read into memory.
    """

    order: Batches
    train: Iterable[Batch]
    val: Iterable[Batch]
    val_samples: Samples
    lost: list[str]


class Sampler(Protocol):
    """A task, as far as it tells how images become batches."""

    @staticmethod
    def collate(samples: list[Any]) -> Batch:
        """A batch of samples, some of which may be lines about why there is none."""

    def samples(self, source: Source, size: tuple[int, int] | None, *, training: bool) -> Samples:
        """Images of a source as a model is given them, before they are normalised."""


def open_feeds(
    recipe: Recipe,
    data: Data,
    task: Sampler,
    size: tuple[int, int],
    device: torch.device,
    note: Callable[[str], None],
) -> Feeds:
    """The feeds of a run at images of `size`; raises where no image can be read, or a bad one is refused."""
    train, val, lost = data.train, data.val, list[str]()
    if recipe.cache:
        if len(train) > 5000:
            note("reading all images into memory")
        train, bad, notes = cached(train, recipe.in_chans, recipe.fill)
        val, more_bad, more_notes = cached(val, recipe.in_chans, recipe.fill)
        lost = bad + more_bad
        for line in told(notes + more_notes):
            note(line)
        refuse(recipe, lost)
        for source in (train, val):
            if not len(source):
                raise LinsightError(f"no image could be read: {lost[0]}")
    workers = default_workers() if recipe.workers is None else recipe.workers
    pin = device.type == "cuda"
    order = Batches(len(train), recipe.batch_size, seed=recipe.seed, shuffle=True, repeats=recipe.aug_repeats)
    once = Batches(len(val), recipe.batch_size, shuffle=False)
    samples, val_samples = task.samples(train, size, training=True), task.samples(val, size, training=False)
    return Feeds(
        order,
        loader(samples, order, workers=workers, pin=pin, collate=task.collate),
        loader(val_samples, once, workers=min(workers, len(once)), pin=pin, collate=task.collate),
        val_samples,
        lost,
    )


def refuse(recipe: Recipe, bad: list[str]) -> None:
    """Raise if there are bad images and the recipe has none of it."""
    if bad and recipe.on_bad_image == "refuse":
        raise LinsightError(f"unreadable image {bad[0]} (on_bad_image=skip leaves such images out)")


def default_workers() -> int:
    """Processes that read images beside the training process, which uses the cores too."""
    cores = os.cpu_count() or 1
    return 1 if cores <= 2 else min(8, cores - 1)
