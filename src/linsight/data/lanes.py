"""The order of a stream: lanes, each of which goes through shards of its own, side by side.

A lane reads its shards one after the other and mixes the rows of a block. Every batch has a part of each lane, so that
the batches of an epoch depend on the seed, the epoch and the data: not on how many processes read, or train. Where a
lane stands is a few numbers, from which it goes on at any step.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from linsight.errors import LinsightError

from .images import Batch, Samples, collate, start_worker
from .random import Batches, key
from .sources import Source

_BUFFERED = 2048  # rows of all lanes that are mixed at a time
_PART = 32  # images of a batch that come from one lane, where there are shards enough
_FEWEST = 8  # lanes, where there are as many shards
_EMPTY = 100  # turns without a row, one after the other, after which there is none
_AHEAD = 4  # batches that a process reads ahead


class Table(Protocol):
    """Rows in shards that are read in sequence."""

    label: str
    num_shards: int

    def rows(self, shard: int, start: int = 0) -> Iterator[Any]:
        """The rows of a shard, from one on."""
        ...

    def source(self, rows: Sequence[Any]) -> Source:
        """Some rows as a source."""
        ...


class Place(NamedTuple):
    """Where a lane stands: the block it is in, how many of its rows were taken, and the place of the block's first row.

    turn: how often the lane has gone through its shards.  shard: the number of the shard in this turn.
    """

    block: int = 0
    taken: int = 0
    turn: int = 0
    shard: int = 0
    row: int = 0


def count_lanes(shards: int, batch_size: int) -> int:
    """How many lanes a stream has: a power of two, which processes share evenly."""
    most = min(shards, batch_size, max(_FEWEST, batch_size // _PART))
    return 1 << (most.bit_length() - 1)


def part(batch_size: int, lane: int, lanes: int) -> int:
    """How many images of a batch come from a lane: as many, of an even batch, as from the lane as far from the end.

    So lanes that are as far from either end hold images that mixing pairs.
    """
    if lanes == 1:
        return batch_size
    half, place = lanes // 2, min(lane, lanes - 1 - lane)
    images = batch_size // 2 if lane >= half else batch_size - batch_size // 2
    return images * (place + 1) // half - images * place // half


class Lane:
    """The rows of one lane in an epoch of training, without an end: after its last shard it begins anew.

    Args:
        table: the rows.
        bits: what the order depends on, a key of seed and epoch.
        lane: its number among `lanes`.
        place: where it goes on.
    """

    def __init__(self, table: Table, bits: int, lane: int, lanes: int, place: Place) -> None:
        self.table, self.bits, self.lane, self.lanes = table, bits, lane, lanes
        self.size = max(1, _BUFFERED // lanes)
        self.place = place
        self._next = place.block, place.taken
        self._rows = self._sequence(place)
        self._block: list[tuple[int, Any]] = []

    def take(self, count: int) -> list[tuple[int, Any]]:
        """The next rows, with their numbers in the lane."""
        taken: list[tuple[int, Any]] = []
        while len(taken) < count:
            if not self._block:
                self._begin_block()
            some = self._block[: count - len(taken)]
            del self._block[: len(some)]
            self.place = self.place._replace(taken=self.place.taken + len(some))
            taken += some
        return taken

    def _begin_block(self) -> None:
        (block, done), rows = self._next, list[tuple[tuple[int, int, int], Any]]()
        for item in self._rows:
            if item is not None:
                rows.append(item)
            if rows and (item is None or len(rows) == self.size):
                break
        self.place, self._next = Place(block, done, *rows[0][0]), (block + 1, 0)
        order = np.random.default_rng(key(self.bits, self.lane, block)).permutation(len(rows)).tolist()
        self._block = [(block * self.size + i, rows[i][1]) for i in order[done:]]

    def _sequence(self, place: Place) -> Iterator[tuple[tuple[int, int, int], Any] | None]:
        """The rows from the beginning of a block on, each with its turn, shard and row; None at the end of a turn."""
        turn, first, start, empty = place.turn, place.shard, place.row, 0
        while empty < _EMPTY:
            order = np.random.default_rng(key(self.bits, turn)).permutation(self.table.num_shards)
            empty += 1
            for number, shard in enumerate(order[self.lane :: self.lanes].tolist()):
                if number < first:
                    continue
                for row, values in enumerate(self.table.rows(shard, start), start):
                    yield (turn, number, row), values
                    empty = 0
                start = 0
            yield None
            turn, first = turn + 1, 0
        raise LinsightError(f"'{self.table.label}' has shards without a row: leave them out")


class StreamFeed:
    """The batches of a stream, to iterate once an epoch.

    In training, from the step `batches.start` on: at the place `batches.place`, where that is of this step, else what
    was before is read and left out. `batches.place` is then the place behind the last batch. In evaluation, each image
    once.

    Args:
        table: the stream.
        samples: how its images are transformed.
        batches: epoch, start, seed and size.
        workers: processes that read: at most so many.
        collate: makes a batch of samples.
        rank: of the process that trains, among `world`: each has its share of every batch in training, from both of its
            ends, and of the shards in evaluation.
    """

    def __init__(
        self,
        table: Table,
        samples: Samples,
        batches: Batches,
        *,
        workers: int,
        pin: bool,
        collate: Callable[[list[Any]], Batch] = collate,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.table, self.samples, self.batches, self.pin, self.collate = table, samples, batches, pin, collate
        if batches.shuffle:
            self.lanes = count_lanes(table.num_shards, batches.batch_size)
            pairs = max(1, self.lanes // 2)
            if pairs % world:
                raise LinsightError(
                    f"'{table.label}' has {self.lanes} lanes of shards, which {world} processes do not share evenly: "
                    f"take a power of two, up to {pairs}, a larger batch_size, or write it in more shards"
                )
            first = range(rank * pairs // world, (rank + 1) * pairs // world)
            self.own = sorted({*first, *(self.lanes - 1 - lane for lane in first)})
        else:
            self.lanes = count_lanes(table.num_shards, world * _PART)
            self.own = list(range(rank, self.lanes, world))
        most = min(workers, len(self.own))
        self.workers = next(count for count in range(most, -1, -1) if count == 0 or len(self.own) % count == 0)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return self._training() if self.batches.shuffle else self._once()

    def _training(self) -> Iterator[Batch]:
        batches, lanes = self.batches, {lane: Place() for lane in self.own}
        start, place = 0, batches.place or {}
        known = {int(lane): numbers for lane, numbers in place.get("lanes", {}).items()}
        if (place.get("epoch"), place.get("step")) == (batches.epoch, batches.start) and lanes.keys() <= known.keys():
            start, lanes = batches.start, {lane: Place(*known[lane]) for lane in self.own}
        found = self._parts(_Training(self, lanes, start))
        for step in range(batches.start, len(batches)):
            parts = list(itertools.islice(found, len(self.own)))
            lanes = {lane: place for lane, (_, place) in zip(self.own, parts, strict=True)}
            batches.place = {
                "epoch": batches.epoch,
                "step": step + 1,
                "lanes": {lane: list(place) for lane, place in lanes.items()},
            }
            yield _joined([batch for batch, _ in parts])

    def _once(self) -> Iterator[Batch]:
        for batch in self._parts(_Once(self)):
            if batch is not None:
                yield batch

    def _parts(self, dataset: "_Reader") -> Iterator[Any]:
        """The items of lanes, by turns in their order; a line about what cannot be read is raised."""
        ahead = max(2, _AHEAD * len(self.own) // self.workers) if self.workers else None
        for item in DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            prefetch_factor=ahead if self.batches.shuffle else 2 if self.workers else None,
            pin_memory=self.pin,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
        ):
            if isinstance(item, str):
                raise LinsightError(item)
            yield item


class _Reader(IterableDataset[Any]):
    """The items of the lanes of a process, by turns: in each round, one of each lane."""

    def __init__(self, feed: StreamFeed) -> None:
        self.table, self.samples, self.collate = feed.table, feed.samples, feed.collate
        self.lanes, self.own, self.size = feed.lanes, feed.own, feed.batches.batch_size

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        own = self.own if info is None else self.own[info.id :: info.num_workers]
        try:
            yield from self.items(own)
        except LinsightError as error:  # which would come with a traceback out of another process
            yield str(error)

    def items(self, own: Sequence[int]) -> Iterator[Any]:
        """The items of some lanes."""
        raise NotImplementedError

    def batch(self, rows: Sequence[tuple[int, Any]], epoch: int, lane: int) -> Batch:
        """Rows, with their numbers in a lane, as a batch."""
        source = self.table.source([row for _, row in rows])
        return self.collate(
            [
                self.samples.take(source, i, (epoch, lane, number))
                if source.targets[i] >= 0
                else f"{source.name(i)}: has no label that is known"
                for i, (number, _) in enumerate(rows)
            ]
        )


class _Training(_Reader):
    """Parts of batches, each with the place behind it."""

    def __init__(self, feed: StreamFeed, places: Mapping[int, Place], step: int) -> None:
        super().__init__(feed)
        batches = feed.batches
        self.places, self.step, self.start, self.end = places, step, batches.start, len(batches)
        self.seed, self.epoch = batches.seed, batches.epoch

    def items(self, own: Sequence[int]) -> Iterator[tuple[Batch, Place]]:
        """See `_Reader`."""
        bits = key(self.seed, self.epoch)
        lanes = {lane: Lane(self.table, bits, lane, self.lanes, self.places[lane]) for lane in own}
        for lane, rows in lanes.items():
            for _ in range(self.step, self.start):  # without the place, all that was before
                rows.take(part(self.size, lane, self.lanes))
        for _ in range(self.start, self.end):
            for lane, rows in lanes.items():
                taken = rows.take(part(self.size, lane, self.lanes))
                yield self.batch(taken, self.epoch, lane), rows.place


class _Once(_Reader):
    """Batches of whole shards, None for a lane that has come to its end before others."""

    def items(self, own: Sequence[int]) -> Iterator[Batch | None]:
        """See `_Reader`."""
        lanes = {lane: enumerate(self._rows(lane)) for lane in own}
        while lanes:
            items: list[Batch | None] = []
            for lane in own:
                rows = list(itertools.islice(lanes[lane], self.size)) if lane in lanes else []
                if not rows:
                    lanes.pop(lane, None)
                items.append(self.batch(rows, 0, lane) if rows else None)
            yield from items

    def _rows(self, lane: int) -> Iterator[Any]:
        for shard in range(lane, self.table.num_shards, self.lanes):
            yield from self.table.rows(shard)


def _joined(parts: Sequence[Batch]) -> Batch:
    """Parts as one batch."""
    images = [part.images for part in parts if len(part.targets)]
    return Batch(
        torch.cat(images) if images else torch.empty(0, dtype=torch.uint8),
        torch.cat([part.targets for part in parts]),
        [line for part in parts for line in part.bad],
        tuple(itertools.chain.from_iterable(part.notes for part in parts)),
    )


def _as_it_is(item: Any) -> Any:
    return item
