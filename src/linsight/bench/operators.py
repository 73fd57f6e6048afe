"""An operator to time: a mechanism without projections on random tokens, or PyTorch's softmax attention at its best."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Tokens, create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from linsight.runtime.device import autocast

from .counting import count_flops
from .roofline import Traffic, least_bytes
from .rounds import Step

SOFTMAX = "softmax"


class Call(NamedTuple):
    """A forward of an operator.  inputs: its tokens.  module: its parameters, if it has any."""

    run: Callable[[], Tensor]
    inputs: list[Tensor]
    module: nn.Module | None = None


def operator_call(
    name: str,
    grid: tuple[int, int],
    batch: int,
    dim: int,
    heads: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    train: bool = False,
) -> Call:
    """The mechanism `name` on `batch` random q, k and v `(B, N, H, D)`, N the tokens of `grid`.

    Softmax is one call of `scaled_dot_product_attention` on contiguous `(B, H, N, D)`: torch picks its backend.
    """
    if heads < 1 or dim % heads:
        raise LinsightError(f"{heads} heads do not divide a width of {dim}: choose a divisor")
    shape = (batch, grid[0] * grid[1], heads, dim // heads)

    def tokens(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_(train)

    if name == SOFTMAX:
        q, k, v = (tokens(shape[0], shape[2], shape[1], shape[3]) for _ in range(3))
        return Call(lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v])
    core = create_core(name, dim, heads, grid=grid, device=device).train(train)
    q, k, v = (tokens(*shape) for _ in range(3))
    x = tokens(*shape[:2], dim)
    extra = tokens(*shape[:2], core.extra_dim) if core.extra_dim else None
    given, layout = Tokens(q, k, v, x, None, extra), Layout(Grid(*grid))
    return Call(lambda: core(given, layout), [t for t in given if t is not None], core)


def forward_backward(call: Call, device: torch.device, dtype: torch.dtype | None) -> Callable[[], list[Tensor | None]]:
    """A forward, and the gradients of inputs and parameters for a random one of the output."""
    leaves = [*call.inputs, *(call.module.parameters() if call.module else ())]
    grad: list[Tensor] = []

    def step() -> list[Tensor | None]:
        with autocast(device, dtype):
            out = call.run()
        if not grad:
            grad.append(torch.randn_like(out))
        for leaf in leaves:
            leaf.grad = None
        out.backward(grad[0])
        return [leaf.grad for leaf in leaves]

    return step


def operator_step(
    name: str,
    grid: tuple[int, int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    dim: int,
    heads: int,
    train: bool,
    compiled: bool,
) -> tuple[dict[str, Any], Step]:
    """The cost of a step of an operator, and the step.

    Operations are those of the plain form, a training step's three times a forward's; bytes are the least that any
    form must move. Inputs that the mechanism does not use are not counted.
    """
    meta = torch.device("meta")
    one = operator_call(name, grid, 1, dim, heads, meta, train=True)
    used = [found is not None for found in forward_backward(one, meta, None)()]  # the first: some things are made once
    forward = count_flops(one.run)
    call = operator_call(name, grid, batch, dim, heads, device, dtype, train)

    def infer() -> Tensor:
        with torch.inference_mode(), autocast(device, dtype):
            return call.run()

    out = infer()
    with Traffic() as traffic:
        infer()
    inputs = [t for t, counts in zip(call.inputs, used, strict=False) if counts]
    facts = {
        "param_count": sum(p.numel() for p in call.module.parameters()) / 1e6 if call.module else 0.0,
        "gmacs": forward / 2e9,
        "flops": (3 if train else 1) * forward * batch,
        "bytes": least_bytes(inputs, call.module, out, train),
        "form": ", ".join(sorted(traffic.fused)) if call.module else _backend(call.inputs),
    }
    if compiled:
        call = call._replace(run=torch.compile(call.run))
    return facts, forward_backward(call, device, dtype) if train else infer


def _backend(inputs: list[Tensor]) -> str:
    """The backend that torch picks for softmax attention on these tensors, where it tells."""
    choice = getattr(torch, "_fused_sdp_choice", None)  # no public name for it
    if choice is None:
        return ""
    return torch.nn.attention.SDPBackend(choice(*inputs)).name.lower()
