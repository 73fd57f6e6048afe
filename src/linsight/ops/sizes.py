"""Sizes that may be unknown: what to write in the place of an `if`, so that one graph is right at every size.

While a graph is made, a size may be a symbol (torch.compile, torch.export), a tensor of no axes (torch.jit.trace) or a
`torch.fx.Proxy`. To compare one is to guard the graph, which some exporters then drop, or to freeze it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def traced(*given: Any) -> bool:
    """True while a graph is made, where to compare sizes would be a guard on them, or freeze them.

    given: tensors or sizes that torch.fx may have put a `Proxy` in the place of: nothing can be asked of one.
    """
    return torch.compiler.is_compiling() or freezes() or any(map(is_proxy, given))


def leaves() -> bool:
    """True while a graph is made that runs elsewhere: it is to hold torch's own operators, in their plain forms."""
    return torch.compiler.is_exporting() or freezes()


def transformed() -> bool:
    """True inside torch.func.grad, vmap, jvp and their like: an operator of one's own has no rule for them.

    Forward-mode gradients of one would even be zero, without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def freezes() -> bool:
    """True under torch.jit.trace, which keeps plain numbers, such as how many groups a convolution has."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


def is_proxy(x: Any) -> bool:
    """True for what stands in for a tensor, or its size, under `torch.fx.symbolic_trace`."""
    return isinstance(x, torch.fx.Proxy)


def in_example(size: Any) -> int | None:
    """A size in the example that a graph is made with, to choose a form by, not a result; None where nobody tells."""
    if torch.compiler.is_dynamo_compiling():
        return None
    known = size if isinstance(size, int) else getattr(getattr(size, "node", None), "hint", None)
    return None if known is None else int(known)


def at_least(side: Any, low: Any) -> Any:
    """The larger of two sizes."""
    return _extreme(side, low, max, torch.sym_max, torch.maximum)


def at_most(side: Any, high: Any) -> Any:
    """The smaller of two sizes."""
    return _extreme(side, high, min, torch.sym_min, torch.minimum)


def _extreme(a: Any, b: Any, known: Any, symbolic: Any, traced: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):  # sizes under torch.jit.trace
        return traced(*(x if isinstance(x, Tensor) else torch.tensor(x) for x in (a, b)))
    return known(a, b) if type(a) is type(b) is int else symbolic(a, b)


def divided(places: Tensor, size: Any) -> tuple[Tensor, Tensor]:
    """Whole numbers `places` divided by a size, and what remains; for exporters that know no remainder by a symbol."""
    whole = places // size
    return whole, places - whole * size


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix @ x`, of a matrix that is one for the whole batch of `x`.

    In a graph that leaves the batch comes first: exporters spread the matrix over it, and keep an example's batch of 1.
    """
    return (x.transpose(-2, -1) @ matrix.transpose(-2, -1)).transpose(-2, -1) if leaves() else torch.matmul(matrix, x)


def copied(x: Tensor) -> Tensor:
    """`x`, in a graph that leaves a dense copy of it.

    Of another view an exporter asks whether its batch is 1, and keeps the answer of the example.
    """
    return x.clone(memory_format=torch.contiguous_format) if leaves() else x


def spread(x: Tensor, batch: Any) -> Tensor:
    """`x` `(1 or batch, ...)`, in a graph that leaves `(batch, ...)`: see `copied`, of products over a batch."""
    return copied(x.expand(batch, *x.shape[1:])) if leaves() else x


def unflatten(x: Tensor, axis: int, sizes: Sequence[Any]) -> Tensor:
    """`x.unflatten(axis, sizes)`; the exporter that traces would keep all sizes of `x` behind that."""
    if not freezes():
        return x.unflatten(axis, tuple(sizes))
    axis = axis % x.ndim
    return x.reshape([*(x.shape[i] for i in range(axis)), *sizes, *(x.shape[i] for i in range(axis + 1, x.ndim))])
