"""The batches of a run: what it trains on and what it is evaluated on."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.files import user_cache
from linsight.runtime.launch import ALONE, Copy
from linsight.runtime.places import located

from ._streams import Stream
from .datasets import Data
from .disk import on_disk
from .images import Batch, Samples, cached, loader, told
from .random import Batches
from .sources import Source, WithPixels
from .trees import shown


@dataclasses.dataclass(frozen=True)
class Feeds:
    """Loaders to iterate once an epoch; `order` says from which epoch and step."""

    order: Batches
    train: Iterable[Batch]
    val: Iterable[Batch]
    val_samples: Samples


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
    copy: Copy = ALONE,
) -> Feeds:
    """The feeds of a run at images of `size`; raises where no image can be read, or a bad one is refused.

    copy: the process, of those that share each batch.
    """
    workers = readers(recipe, copy)
    _check_order(recipe, data.train)
    train, val = data.train, data.val
    if recipe.cache != "off":
        train, val = _cached(recipe, [train, val], workers, note)
    pin = device.type == "cuda"
    shards = train.shards if recipe.order == "shards" else None
    order = Batches(
        len(train),
        recipe.batch_size,
        seed=recipe.seed,
        shuffle=True,
        repeats=recipe.aug_repeats,
        shards=shards,
        length=recipe.epoch_images,
    )
    once = Batches(len(val), recipe.batch_size, shuffle=False)
    samples, val_samples = task.samples(train, size, training=True), task.samples(val, size, training=False)
    shown_samples = val_samples
    if isinstance(val, Stream) and recipe.figures:
        shown_samples = task.samples(val.head(), size, training=False)
    return Feeds(
        order,
        loader(samples, order, workers=min(workers, len(order)), pin=pin, collate=task.collate, copy=copy),
        loader(val_samples, once, workers=min(workers, len(once)), pin=pin, collate=task.collate, copy=copy),
        shown_samples,
    )


def _check_order(recipe: Recipe, train: Source) -> None:
    """Raise for a recipe that asks of data what they do not have."""
    if recipe.draft and recipe.cache != "off":
        raise LinsightError(
            f"draft={recipe.draft} decodes anew in every epoch, and cache={recipe.cache} keeps the whole"
        )
    if isinstance(train, Stream):
        for name, plain in (("cache", "off"), ("aug_repeats", 1)):
            if getattr(recipe, name) != plain:
                raise LinsightError(
                    f"{name}={getattr(recipe, name)} needs data in random access, and {shown(recipe.data)} is a "
                    f"stream: set {name}={plain}, or use hfds/"
                )
    elif recipe.order == "shards" and train.shards is None:
        raise LinsightError(
            f"order=shards is for images in shards, as train-000.tar, and {shown(recipe.data)} has none: use order=full"
        )


def _cached(recipe: Recipe, sources: list[Source], workers: int, note: Callable[[str], None]) -> list[Source]:
    """Sources in memory or in files, as the recipe says; raises for bad images where those are refused."""
    found: list[Source] = []
    notes: list[str] = []
    if recipe.cache == "memory" and len(sources[0]) > 5000:
        note("reading all images into memory")
    folder = located(recipe.cache_dir) if recipe.cache_dir else user_cache("images")
    for source in sources:
        if recipe.cache == "memory":
            kept, bad, told_of = cached(source, recipe.in_chans, recipe.fill, workers)
        else:
            kept, bad, told_of = on_disk(source, recipe.in_chans, recipe.fill, folder, workers, note)
        refuse(recipe, bad)
        if len(bad) == len(kept):
            raise LinsightError(f"no image could be read: {bad[0]}")
        found.append(WithPixels(source, kept) if source.annotated else kept)
        notes += told_of
    for line in told(notes):
        note(line)
    return found


def refuse(recipe: Recipe, bad: list[str]) -> None:
    """Raise if there are bad images and the recipe has none of it."""
    if bad and recipe.on_bad_image == "refuse":
        raise LinsightError(f"unreadable image {bad[0]} (on_bad_image=skip leaves such images out)")


def readers(recipe: Recipe, copy: Copy = ALONE) -> int:
    """Processes that read images for this one; by default, all on a machine have as many as one alone would have."""
    return max(1, default_workers() // copy.local_world) if recipe.workers is None else recipe.workers


def default_workers() -> int:
    """Processes that read images beside the training process, which uses the cores too."""
    cores = os.cpu_count() or 1
    return 1 if cores <= 2 else min(8, cores - 1)
