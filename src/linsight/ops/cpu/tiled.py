"""The linear family on a CPU: the plain form over tiles of tokens that stay in the cache, their states merged.

What the plain form writes between its steps then never reaches main memory: queries, keys and values are read once.
Without gradients, which would keep all of it.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..conv import Convolved, made
from ..features import Features
from ..linear import LinearState, plain_absorb, plain_central, product, products
from ..rotary import Turn
from ..states import Moments, full_precision

BUDGET = 2**18  # numbers in a tile of one tensor: fewer, and starting threads costs more than the cache gains
ROWS = 32  # convolved at once, at least: with fewer, too many would be seen twice
STEPS = 2**16  # numbers: with fewer, the number of calls is what counts

# Queries, their images, where to write, what is added to all but the first tokens, and how many those are.
Write = Callable[[Features, slice, Tensor, Tensor | None, int], None]


class Part(NamedTuple):
    """Some tokens of some images; `tokens` may be all of them."""

    images: slice
    tokens: slice


def parts(x: Tensor, step: int, offset: int = 0) -> Iterator[list[Part]]:
    """`x` `(B, N, H, D)` in groups of images, each cut into parts of `step` tokens, the first of `offset` more."""
    batch, n = x.shape[:2]
    images = max(1, step // max(1, n))
    edges = [0, *range(offset + step, n, step), n]
    for first in range(0, batch, images):
        group = slice(first, min(batch, first + images))
        yield [Part(group, slice(*pair)) for pair in itertools.pairwise(edges)]


def budget(x: Tensor) -> int:
    """How many tokens of `x` `(B, N, H, D)` are about `BUDGET` numbers."""
    return max(1, BUDGET // max(1, x[0, 0].numel()))


def whole_rows(x: Tensor, turn: Turn | None, width: int = 0) -> tuple[int, int]:
    """The step and the offset of parts that are whole rows, where there is a turn or a `width` of rows; else any."""
    step = budget(x)
    if width:  # to be convolved, which begins anew with each part
        return max(ROWS, step // width) * width, 0
    return (step, 0) if turn is None else (max(1, step // turn.size[1]) * turn.size[1], turn.prefix)


def absorb(k: Features, v: Tensor, keep: Tensor | None) -> LinearState:
    """`linear_absorb`."""
    if v.numel() <= BUDGET:
        return plain_absorb(k, v, keep)
    groups = []
    for group in parts(v, *whole_rows(v, k.turn)):
        states = [plain_absorb(k.part(*part), v[part], _part(keep, part)) for part in group]
        groups.append(LinearState(*(torch.stack(fields).sum(dim=0) for fields in zip(*states, strict=True))))
    return LinearState(*map(torch.cat, zip(*groups, strict=True)))


def central(k: Features, v: Tensor, keep: Tensor | None) -> Moments:
    """`central_absorb`."""
    if v.numel() <= BUDGET:
        return plain_central(k, v, keep)
    groups = []
    for group in parts(v, *whole_rows(v, k.turn)):
        states = [plain_central(k.part(*part), v[part], _part(keep, part)) for part in group]
        groups.append(Moments.stacked(states))
    return Moments(*map(torch.cat, zip(*groups, strict=True)))


def read(q: Features, state: LinearState, eps: float, add: Convolved | Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear_read`."""

    def write(q: Features, images: slice, out: Tensor, add: Tensor | None, ahead: int) -> None:
        above, below = products(q, LinearState(*(field[images] for field in state)), eps)
        if add is None:
            torch.div(above, below, out=out)
            return
        if ahead:
            torch.div(above[:, :ahead], below[:, :ahead], out=out[:, :ahead])
        torch.addcdiv(add, above[:, ahead:], below[:, ahead:], out=out[:, ahead:])

    return _read(q, state.kv, add, dtype, write)


def affine(q: Features, matrix: Tensor, shift: Tensor, add: Convolved | Tensor | None, dtype: torch.dtype) -> Tensor:
    """`affine_read`."""

    def write(q: Features, images: slice, out: Tensor, add: Tensor | None, ahead: int) -> None:
        constant = shift[images, None]
        if add is None or out.shape[0] > 1 or out.numel() < STEPS:
            torch.add(product(q, matrix[images]), constant, out=out)
            if add is not None:
                out[:, ahead:].add_(add)
            return
        torch.add(add, constant, out=out[:, ahead:])
        if ahead:
            out[:, :ahead] = constant
        mapped = q.mapped()
        with full_precision(mapped):  # (H, n, E) += (H, n, D) (H, D, E), where it lies
            out[0].transpose(0, 1).baddbmm_(q.turned(mapped)[0].transpose(0, 1), matrix[images][0])

    return _read(q, matrix, add, dtype, write)


def _read(q: Features, matrix: Tensor, add: Convolved | Tensor | None, dtype: torch.dtype, write: Write) -> Tensor:
    """The output that `write` writes part by part, with `add`, which lacks the first tokens."""
    shape = (*q.x.shape[:3], matrix.shape[-1])
    if q.x.numel() <= BUDGET or not isinstance(add, Convolved):
        later, own = None, made(add)
        prefix = 0 if own is None else shape[1] - own.shape[1]
    else:
        later, own = add, None
        prefix = shape[1] - later.x.shape[1]
    added = None if own is None else own.to(matrix.dtype)
    # Sums are rounded once, at the end.
    if q.x.numel() <= BUDGET:
        whole = matrix.new_empty(shape)
        write(q, slice(None), whole, added, prefix)
        return whole.to(dtype)
    out = matrix.new_empty(shape, dtype=dtype)
    width = later.size[1] if later else 0
    step, offset = whole_rows(out, q.turn, width)
    for group in parts(out, step, prefix if later else offset):
        for part in group:
            rounded = out[part]
            mine = rounded if dtype == matrix.dtype else matrix.new_empty(rounded.shape)
            start, stop = part.tokens.start - prefix, part.tokens.stop - prefix
            own = None  # before the next is made
            if later:
                own = later.rows(part.images, max(0, start) // width, stop // width)
            elif added is not None:
                own = added[part.images, max(0, start) : max(0, stop)]
            write(q.part(*part), part.images, mine, own, max(0, -start))
            if mine is not rounded:
                rounded.copy_(mine)
    return out


def _part(x: Tensor | None, part: Part) -> Tensor | None:
    return None if x is None else x[part]
