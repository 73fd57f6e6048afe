"""Collectives of ranks: a gather of states and a change of bands, both differentiable.

Every gradient is that of the sum of all ranks' losses: what ranks were given of a tensor, they send back, and it adds.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from linsight.errors import LinsightError
from linsight.ops import State, merge

Spans: TypeAlias = Sequence[tuple[int, int]]  # for each rank: first, and one past the last


class Ranks:
    """One dimension of a mesh, whose ranks hold bands of an image, from the top to the bottom."""

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or ()
            offer = f"one of its dimensions, as mesh['{names[-1]}']" if names else "a mesh of one dimension"
            raise LinsightError(f"rows are split along one dimension, and this mesh has {mesh.ndim}: pass {offer}")
        self.group = mesh.get_group()
        self.count, self.own = mesh.size(), mesh.get_local_rank()
        self.name = mesh.mesh_dim_names[0] if mesh.mesh_dim_names else "rows"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self  # a copy of a model is on the same ranks

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """A context for each collective: what torch says of a lost rank becomes one line."""
        try:
            yield
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            raise LinsightError(
                f"rank {self.own} of {self.count} along '{self.name}' has lost the others, and with them the result: "
                f"one of them died, or made other calls than this one ({why})"
            ) from error

    def shares(self, count: int) -> tuple[int, ...]:
        """Where the bands of `count` rows begin, and where the last one ends; as even as can be, none empty."""
        if count < self.count:
            raise LinsightError(
                f"{count} rows of tokens or pixels cannot be split over {self.count} ranks: use at most {count} of them"
            )
        return tuple(count * r // self.count for r in range(self.count + 1))

    def bounds(self, height: int, x: Tensor, **same: int) -> tuple[int, ...]:
        """Where the bands of all ranks begin, from the `height` of each; `same` must be so on all of them."""
        same |= {
            "dtype": zlib.crc32(str(x.dtype).encode()),
            "requires_grad": int(x.requires_grad and torch.is_grad_enabled()),
        }
        told = self.gather(torch.tensor([height, *same.values()], device=x.device)).tolist()
        for name, values in zip(same, zip(*(row[1:] for row in told), strict=True), strict=True):
            if len(set(values)) > 1:
                shown = "" if name == "dtype" else f": {', '.join(map(str, values))}"
                raise LinsightError(f"the bands of the ranks along '{self.name}' differ in {name}{shown}")
        heights = [row[0] for row in told]
        if min(heights) < 1:
            raise LinsightError(f"each rank needs a row or more, and the ranks along '{self.name}' have {heights}")
        return tuple(itertools.accumulate(heights, initial=0))

    def gather(self, x: Tensor) -> Tensor:
        """`x` of all ranks, `(ranks, ...)`, equal on all of them."""
        return _Gather.apply(x, self)

    def gather_states(self, state: State) -> list[State]:
        """The state of each rank, in one collective."""
        parts = list(_leaves(state))
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        rows = self.gather(torch.cat([part.to(dtype).flatten() for part in parts]))
        found = []
        for row in rows.unbind():
            pieces = row.split([part.numel() for part in parts])
            shaped = (piece.view(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True))
            found.append(_rebuilt(state, shaped))
        return found

    def fold(self, state: State) -> State:
        """The merged state of all ranks, bit for bit the same on each."""
        return functools.reduce(merge, self.gather_states(state))

    def tied(self, x: Tensor, states: Any) -> Tensor:
        """`x`, of which all `states` are a part in the graph, with a gradient of 0 where this rank does not read them.

        Others may, and in the backward pass a gather needs all ranks.
        """
        return _Tied.apply(x, *(part for part in _leaves(states) if part.requires_grad))

    def exchange(self, x: Tensor, dim: int, have: Sequence[int], want: Spans) -> Tensor:
        """The stretch `want[own]` along `dim` of what lies over the ranks, of which each has that from `have[own]`.

        Spans may overlap, and reach beyond neighbours.
        """
        if all(have[r] <= a and b <= have[r + 1] for r, (a, b) in enumerate(want)):
            first, end = want[self.own]
            return x.narrow(dim, first - have[self.own], end - first)
        return _Exchange.apply(x, self, dim, tuple(have), tuple(want))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        out = x.new_empty(ranks.count * x.numel())
        with ranks.speaking():
            dist.all_gather_into_tensor(out, x.flatten(), group=ranks.group)
        return out.view(ranks.count, *x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad[0].numel())
        with ctx.ranks.speaking():
            dist.reduce_scatter_tensor(own, grad.flatten(), group=ctx.ranks.group)
        return own.view(grad.shape[1:]), None


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> Tensor:
        ctx.kinds = [(part.shape, {"dtype": part.dtype, "device": part.device}) for part in parts]
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, **kind) for shape, kind in ctx.kinds)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, dim: int, have: tuple[int, ...], want: Spans) -> Tensor:
        own, start, first = ranks.own, have[ranks.own], want[ranks.own][0]
        spans = list(itertools.pairwise(have))
        give = [_common(spans[own], span) for span in want]
        take = [_common(want[own], span) for span in spans]
        length = give[own][1] - give[own][0]  # the part that stays here
        kept = (give[own][0] - start, take[own][0] - first)
        give[own], take[own] = (start, start), (first, first)
        ctx.work = ranks, dim, (start, first), (*kept, length), (give, take), x.shape
        parts = _swap(ranks, x, dim, start, give, take)
        parts[own] = x.narrow(dim, kept[0], length)
        return torch.cat(parts, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ranks, dim, (start, first), (here, there, length), (give, take), shape = ctx.work
        out = grad.new_zeros(shape)
        out.narrow(dim, here, length).copy_(grad.narrow(dim, there, length))
        for (a, b), part in zip(give, _swap(ranks, grad, dim, first, take, give), strict=True):
            out.narrow(dim, a - start, b - a).add_(part)
        return out, None, None, None, None


def _swap(ranks: Ranks, x: Tensor, dim: int, start: int, give: Spans, take: Spans) -> list[Tensor]:
    """Send each rank the stretch `give` of `x`, which begins at `start`; receive from each the one to `take`."""

    def shape(span: tuple[int, int]) -> list[int]:
        return [*x.shape[:dim], span[1] - span[0], *x.shape[dim + 1 :]]

    sent = torch.cat([x.narrow(dim, a - start, b - a).flatten() for a, b in give])
    sizes = [math.prod(shape(span)) for span in take]
    out = x.new_empty(sum(sizes))
    with ranks.speaking():
        dist.all_to_all_single(out, sent, sizes, [math.prod(shape(span)) for span in give], group=ranks.group)
    return [part.view(shape(span)) for part, span in zip(out.split(sizes), take, strict=True)]


def _common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Where two spans overlap; empty, at the start of one of them, where they do not."""
    first = max(a[0], b[0])
    return (first, end) if (end := min(a[1], b[1])) > first else (a[0], a[0])


def _leaves(state: State) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from _leaves(part)


def _rebuilt(state: State, leaves: Iterator[Tensor]) -> State:
    if isinstance(state, Tensor):
        return next(leaves)
    return type(state)(*(_rebuilt(part, leaves) for part in state))
