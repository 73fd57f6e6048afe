"""Linear recurrences along a sequence, h_t = a_t h_(t-1) + b_t, and the selective scan of state-space models.

Wide states are made token by token. A sequence of narrow ones is cut into about sqrt(N) stretches, which are walked
side by side; then each is given the state before it. Products of decays are made forwards only, so nothing is divided
and nothing overflows where decays are up to 1.

A graph that leaves, and torch.func, have torch's own operators in place of the walk: 20 rounds, each of which joins
stretches of twice the length, O(N log N), for sequences of up to 2^20 tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .sizes import leaves, transformed
from .states import accumulator

LEAST = 16  # tokens whose states are there at a time
NUMBERS = 2**18  # or more of them, whose states are so many numbers in all sequences: 1 MB, which the caches hold
WIDE = 2**12  # numbers of a token's states in all sequences, from which on an operator's call costs less than its work
_ROUNDS = 20


def linear_scan(decay: Tensor, value: Tensor, *, reverse: bool = False) -> Tensor:
    """h `(B, N, ...)` of h_t = decay_t h_(t-1) + value_t, elementwise, with h_(-1) = 0; `reverse` from the end on.

    Computed in float32, or float64 for float64, and given so.
    """
    dtype = accumulator(torch.promote_types(decay.dtype, value.dtype))
    decay, value = decay.to(dtype), value.to(dtype)
    if leaves() or transformed():
        return _from_end(_by_doubling, decay, value) if reverse else _by_doubling(decay, value)
    return linear_scan_op(decay, value, reverse)


def selective_scan(x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """y_t = h_t read_t of h_t = exp(step_t rate) h_(t-1) + step_t x_t write_t^T, whose states are S for each channel.

    Gu & Dao, "Mamba" (arXiv 2312.00752), without its skip connection. States of more than a block of tokens are never
    there at a time, and gradients are made from those that each block begins with.

    Args:
        x, step: `(B, N, D)`.
        rate: `(D, S)`, negative.
        write, read: `(B, N, S)`.

    Returns:
        y `(B, N, D)` in float32, or float64 for float64.
    """
    dtype = accumulator(x.dtype)
    x, step, rate, write, read = (t.to(dtype) for t in (x, step, rate, write, read))
    if leaves() or transformed():
        states = _by_doubling(*_terms(x, step, rate, write))
        return _read(states, read)
    out: Tensor = selective_scan_op(x, step, rate, write, read)[0]
    return out


def _terms(x: Tensor, step: Tensor, rate: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and values `(B, N, S, D)` of the recurrence: channels last, as sums over states are cheap then."""
    return torch.exp(step[:, :, None] * rate.t()), (step * x)[:, :, None] * write[..., None]


def _read(states: Tensor, read: Tensor) -> Tensor:
    """Outputs `(B, N, D)`; no matrix product, which may be rounded."""
    return (states * read[..., None]).sum(dim=2)


def _walk(decay: Tensor, value: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """States `(B, N, ...)` from the state `start` `(B, ...)` on, or from the end."""
    if value[:, :1].numel() < WIDE:
        return _from_end(_by_stretches, decay, value, start) if reverse else _by_stretches(decay, value, start)
    states, places = torch.empty_like(value), range(value.shape[1])
    for place in reversed(places) if reverse else places:
        torch.addcmul(value[:, place], decay[:, place], start, out=states[:, place])
        start = states[:, place]
    return states


def _by_stretches(decay: Tensor, value: Tensor, start: Tensor) -> Tensor:
    """`_walk` in about 2 sqrt(N) steps."""
    count = value.shape[1]
    if not value.numel():
        return value.clone()
    length = math.isqrt(count - 1) + 1
    stretches = -(-count // length)
    more = stretches * length - count
    if more:
        decay = torch.cat([decay, decay.new_zeros(decay.shape[0], more, *decay.shape[2:])], dim=1)
        value = torch.cat([value, value.new_zeros(value.shape[0], more, *value.shape[2:])], dim=1)
    since = decay.unflatten(1, (stretches, length)).clone()  # products of decays from the start of a stretch
    states = value.unflatten(1, (stretches, length)).clone()
    for place in range(1, length):
        states[:, :, place].addcmul_(since[:, :, place], states[:, :, place - 1])
        since[:, :, place].mul_(since[:, :, place - 1])
    for stretch in range(stretches):
        states[:, stretch].addcmul_(since[:, stretch], start[:, None])
        start = states[:, stretch, -1]
    return states.flatten(1, 2)[:, :count]


def _from_end(scan: Any, decay: Tensor, value: Tensor, *start: Tensor) -> Tensor:
    found: Tensor = scan(decay.flip(1), value.flip(1), *start)
    return found.flip(1)


def _by_doubling(decay: Tensor, value: Tensor) -> Tensor:
    """`_walk` from nothing, without a loop over tokens."""
    places = torch.arange(value.shape[1], device=value.device)
    for way in range(_ROUNDS):
        before = (places - 2**way).clamp(min=0)
        there = (places >= 2**way).to(value.dtype).reshape(-1, *[1] * (value.ndim - 2))
        value = value + decay * there * value.index_select(1, before)
        decay = decay * (decay.index_select(1, before) * there)
    return value


@torch.library.custom_op("linsight::linear_scan", mutates_args=())
def linear_scan_op(decay: Tensor, value: Tensor, reverse: bool) -> Tensor:
    """`linear_scan` behind an operator of torch, for compiled graphs."""
    start = torch.zeros_like(value.select(1, 0)) if value.shape[1] else value.new_zeros(0)
    return _walk(decay, value, start, reverse).contiguous()


@linear_scan_op.register_fake
def _(decay: Tensor, value: Tensor, reverse: bool) -> Tensor:
    return value.new_empty(value.shape)


def _keep_states(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.reverse = inputs[2]


def _linear_backward(ctx: Any, grad: Tensor) -> Any:
    decay, states = ctx.saved_tensors
    of_value = linear_scan(_moved(decay, not ctx.reverse), grad, reverse=not ctx.reverse)
    return of_value * _moved(states, ctx.reverse), of_value, None


def _moved(x: Tensor, earlier: bool) -> Tensor:
    """`x` `(B, N, ...)` moved by one token, to earlier or later places; zero where nothing comes."""
    none = torch.zeros_like(x[:, :1])
    return torch.cat([x[:, 1:], none], dim=1) if earlier else torch.cat([none, x[:, :-1]], dim=1)


linear_scan_op.register_autograd(_linear_backward, setup_context=_keep_states)


@torch.library.custom_op("linsight::selective_scan", mutates_args=())
def selective_scan_op(x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """`selective_scan`, and the states `(B, blocks, S, D)` that its blocks begin with."""
    out, state = torch.zeros_like(x), x.new_zeros(x.shape[0], *rate.t().shape)
    starts = x.new_zeros(x.shape[0], -(-x.shape[1] // _block(x, rate)), *rate.t().shape)
    for i, own in enumerate(_blocks(x, rate)):
        starts[:, i] = state
        states = _walk(*_terms(x[:, own], step[:, own], rate, write[:, own]), state)
        out[:, own] = _read(states, read[:, own])
        state = states[:, -1]
    return out, starts


@selective_scan_op.register_fake
def _(x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    size = _block(x, rate)
    return torch.empty_like(x), x.new_empty(x.shape[0], (x.shape[1] + size - 1) // size, *rate.t().shape)


@torch.library.custom_op("linsight::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad: Tensor, starts: Tensor, x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, step, rate, write and read, of that by the output."""
    of_x, of_step, of_write, of_read = (torch.zeros_like(t) for t in (x, step, write, read))
    of_rate, after = torch.zeros_like(rate), x.new_zeros(x.shape[0], *rate.t().shape)
    for i, own in reversed([*enumerate(_blocks(x, rate))]):
        asked, given, moved, writing = grad[:, own], x[:, own], step[:, own], write[:, own]
        decay, value = _terms(given, moved, rate, writing)
        states = _walk(decay, value, starts[:, i])
        asking = asked[:, :, None] * read[:, own, :, None]
        asking[:, -1] += after
        by_state = _walk(_moved(decay, True), asking, torch.zeros_like(after), reverse=True)
        after = decay[:, 0] * by_state[:, 0]
        before = torch.cat([starts[:, i : i + 1], states[:, :-1]], dim=1)
        by_rate = by_state * before * decay  # by step * rate
        by_value = _read(by_state, writing)  # by step * x
        of_x[:, own] = by_value * moved
        of_step[:, own] = by_value * given + (by_rate * rate.t()).sum(dim=2)
        of_rate += (by_rate * moved[:, :, None]).sum(dim=(0, 1)).t()
        of_write[:, own] = (by_state * (moved * given)[:, :, None]).sum(dim=-1)
        of_read[:, own] = (states * asked[:, :, None]).sum(dim=-1)
    return of_x, of_step, of_rate, of_write, of_read


@selective_scan_backward.register_fake
def _(
    grad: Tensor, starts: Tensor, x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t) for t in (x, step, rate, write, read))  # type: ignore[return-value]


def _keep_starts(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])


def _selective_backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    return selective_scan_backward(grad.contiguous(), *ctx.saved_tensors)


selective_scan_op.register_autograd(_selective_backward, setup_context=_keep_starts)


def _block(x: Tensor, rate: Tensor) -> Any:
    """The tokens whose states `(B, S, D)` are there at a time, an integer, or a symbol of one in a compiled graph."""
    return torch.sym_max(LEAST, NUMBERS // torch.sym_max(x.shape[0] * rate.shape[0] * rate.shape[1], 1))


def _blocks(x: Tensor, rate: Tensor) -> list[slice]:
    count, size = x.shape[1], _block(x, rate)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
