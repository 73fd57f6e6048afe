"""Randomness as a function of where we are, not as a state that a checkpoint would have to carry.

The order of an epoch, the augmentation of an image and the noise of a step each come from a key:
(seed, epoch), (seed, epoch, image), (seed, epoch, step). So results do not depend on the number of
worker processes, and a run resumes from any step bit for bit.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

TOGETHER = 8  # shards whose images are mixed
_MASK = (1 << 64) - 1


def key(*parts: int) -> int:
    """64 well-mixed bits of a tuple of integers (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = 0
    for part in parts:
        mixed = (mixed + 0x9E3779B97F4A7C15 + (part & _MASK)) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return mixed


def seed_sample(*parts: int) -> None:
    """Seed the generators that transforms draw from: Python's, NumPy's and PyTorch's on the CPU."""
    _seed(key(1, *parts))


def seed_step(*parts: int) -> None:
    """Seed everything a training step draws from, on every device."""
    bits = key(2, *parts)
    _seed(bits)
    torch.manual_seed(bits)


def seed_noise(*parts: int) -> None:
    """Seed what a model draws from, on every device, and nothing else."""
    torch.manual_seed(key(3, *parts))


def _seed(bits: int) -> None:
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    torch.default_generator.manual_seed(bits)


class Batches:
    """The batches of one epoch as lists of (epoch, image), from any step on. For `DataLoader(batch_sampler=)`.

    The epoch travels with the index, so worker processes need no telling of it. Set `epoch` and
    `start` before iterating.

    repeats: more than 1 puts so many copies of an image beside each other, as (epoch, image, copy), and as many
        times fewer images into the epoch (Hoffer et al., CVPR 2020). timm's sampler spreads the copies over
        devices, and starts at the beginning of an epoch only.
    shards: the shard of each image, to go through the images a few shards at a time.
    length: places of an epoch, where there are fewer or more than images (copies count): the first ones of its order,
        or all in another order again, as (epoch, image, copy) from there on.
    place: of a stream, where its last batch ended; who sets `start` may set the place that belongs to it.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool,
        repeats: int = 1,
        shards: Sequence[int] | None = None,
        length: int | None = None,
    ) -> None:
        self.count, self.batch_size, self.seed, self.shuffle = count, batch_size, seed, shuffle
        self.repeats, self.shards = repeats, shards
        self.length = count if length is None or not count else length
        self.epoch = 0
        self.start = 0
        self.place: dict[str, Any] | None = None

    def __len__(self) -> int:
        """The batches of a whole epoch: a last, smaller one is left out of training, where there are others."""
        whole, rest = divmod(self.length, self.batch_size)
        return whole + (rest > 0 and (not self.shuffle or whole == 0))

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        orders: dict[int, Sequence[int]] = {}
        for step in range(self.start, len(self)):
            batch = list[tuple[int, ...]]()
            for place in range(step * self.batch_size, min((step + 1) * self.batch_size, self.length)):
                turn, within = divmod(place, self.count * self.repeats)
                if turn not in orders:
                    orders = {turn: self._order(turn)}
                image, copy = orders[turn][within // self.repeats], turn * self.repeats + within % self.repeats
                plain = self.repeats == 1 and turn == 0
                batch.append((self.epoch, image) if plain else (self.epoch, image, copy))
            yield batch

    def _order(self, turn: int) -> Sequence[int]:
        """The order of all images in one of the turns that an epoch of more places takes."""
        if not self.shuffle:
            return range(self.count)
        draw = np.random.default_rng(key(self.seed, self.epoch, *([turn] if turn else [])))
        order = draw.permutation(self.count) if self.shards is None else by_shard(self.shards, draw)
        return list[int](order.tolist())


def share(count: int, number: int, of: int) -> list[int]:
    """The places of one of `of` shares of `count` images, in order: the first with the last, the second with the last
    but one ...

    So images that mixing pairs, an image and the one as far from the end, are in the same share, and paired in it.
    """
    pairs = -(-count // 2)
    first, last = number * pairs // of, (number + 1) * pairs // of
    return sorted({*range(first, last), *(count - 1 - place for place in range(first, last))})


class Shares:
    """The share of one process of every batch, as `share` cuts it; it may be empty. For `DataLoader(batch_sampler=)`.

    batches: lists of items, whose order all processes know.  number, of: of the process, and how many there are.
    """

    def __init__(self, batches: Iterable[list[tuple[int, ...]]], number: int, of: int) -> None:
        self.batches, self.number, self.of = batches, number, of

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        for batch in self.batches:
            yield [batch[place] for place in share(len(batch), self.number, self.of)]


def by_shard(shards: Sequence[int], draw: np.random.Generator) -> Any:
    """The places of images in a random order that goes through `TOGETHER` random shards at a time.

    shards: the shard of each image.
    """
    numbers, own = np.unique(np.asarray(shards), return_inverse=True)
    turn = draw.permutation(len(numbers))[own] // TOGETHER
    return np.lexsort((draw.permutation(len(own)), turn))


def hold_out(targets: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Two sorted lists of indices, the second with `fraction` of each class (at least one). Always the same split."""
    by_class: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        by_class.setdefault(target, []).append(index)
    rest: list[int] = []
    held: list[int] = []
    for indices in by_class.values():
        indices.sort(key=lambda i: key(i, 20))
        count = max(1, round(fraction * len(indices)))
        held += indices[:count]
        rest += indices[count:]
    return sorted(rest), sorted(held)
