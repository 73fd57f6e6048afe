"""The linear family on a CPU: the plain form over tiles of tokens that stay in the cache, their states merged.

What the plain form writes between its steps then never reaches main memory: queries, keys and values are read once.
Without gradients, which would keep all of it.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..features import Features
from ..linear import LinearState, plain_absorb, plain_central, product, products
from ..rotary import Turn
from ..states import Moments

BUDGET = 2**18  # numbers in a tile of one tensor: fewer, and starting threads costs more than the cache gains


Write = Callable[[Features, slice, Tensor], None]  # queries, their images, where to write


class Part(NamedTuple):
    """Some tokens of some images; `tokens` may be all of them."""

    images: slice
    tokens: slice


def parts(x: Tensor, turn: Turn | None) -> Iterator[list[Part]]:
    """`x` `(B, N, H, D)` in groups of images, each cut into parts of about `BUDGET` numbers: with a turn, rows."""
    batch, n = x.shape[:2]
    step = max(1, BUDGET // max(1, x[0, 0].numel()))
    images = max(1, step // max(1, n))
    offset = 0
    if turn is not None:
        step, offset = max(1, step // turn.size[1]) * turn.size[1], turn.prefix
    edges = [0, *range(offset + step, n, step), n]
    for first in range(0, batch, images):
        group = slice(first, min(batch, first + images))
        yield [Part(group, slice(*pair)) for pair in itertools.pairwise(edges)]


def absorb(k: Features, v: Tensor, keep: Tensor | None) -> LinearState:
    """`linear_absorb`."""
    if v.numel() <= BUDGET:
        return plain_absorb(k, v, keep)
    groups = []
    for group in parts(v, k.turn):
        states = [plain_absorb(k.part(*part), v[part], _part(keep, part)) for part in group]
        groups.append(LinearState(*(torch.stack(fields).sum(dim=0) for fields in zip(*states, strict=True))))
    return LinearState(*map(torch.cat, zip(*groups, strict=True)))


def central(k: Features, v: Tensor, keep: Tensor | None) -> Moments:
    """`central_absorb`."""
    if v.numel() <= BUDGET:
        return plain_central(k, v, keep)
    groups = []
    for group in parts(v, None):
        states = [plain_central(k.part(*part), v[part], _part(keep, part)) for part in group]
        groups.append(Moments.stacked(states))
    return Moments(*map(torch.cat, zip(*groups, strict=True)))


def read(q: Features, state: LinearState, eps: float, add: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear_read`."""

    def write(q: Features, images: slice, out: Tensor) -> None:
        mine = LinearState(*(field[images] for field in state))
        torch.div(*products(q, mine, eps), out=out)

    return _read(q, state.kv, add, dtype, write)


def affine(q: Features, matrix: Tensor, shift: Tensor, add: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`affine_read`."""

    def write(q: Features, images: slice, out: Tensor) -> None:
        torch.add(product(q, matrix[images]), shift[images, None], out=out)

    return _read(q, matrix, add, dtype, write)


def _read(
    q: Features,
    matrix: Tensor,
    add: Tensor | None,
    dtype: torch.dtype,
    write: Callable[[Features, slice, Tensor], None],
) -> Tensor:
    """What `write` writes of each part, and `add`, which lacks the first tokens."""
    shape = (*q.x.shape[:3], matrix.shape[-1])
    prefix = 0 if add is None else shape[1] - add.shape[1]
    # Sums are rounded once, at the end.
    out = matrix.new_empty(shape)
    if q.x.numel() <= BUDGET:
        write(q, slice(None), out)
        if add is not None:
            out[:, prefix:].add_(add)
        return out.to(dtype)
    rounded = out if dtype == out.dtype else out.new_empty(shape, dtype=dtype)
    for group in parts(out, q.turn):
        for part in group:
            mine = rounded[part] if dtype == out.dtype else out.new_empty(rounded[part].shape)
            write(q.part(*part), part.images, mine)
            if add is not None:
                start, stop = part.tokens.start - prefix, part.tokens.stop - prefix
                mine[:, max(0, -start) :].add_(add[part.images, max(0, start) : stop])
            if mine.dtype != dtype:
                rounded[part] = mine
    return rounded


def _part(x: Tensor | None, part: Part) -> Tensor | None:
    return None if x is None else x[part]
