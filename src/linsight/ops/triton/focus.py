"""The focus map's factors in Triton, in one pass over the tokens: what reads the tokens next applies the map."""

from typing import Any

import torch
import triton
from torch import Tensor

from ..features import Features
from ..states import accumulator
from .focus_kernels import scales, scales_backward
from .launch import on
from .sizes import ACCUMULATORS, numbers

_BLOCK = 2048  # numbers that a program holds at once, or one token
_PROGRAMS = 1024  # programs of the backward, each with a row of sums


def focus(x: Tensor, column: Tensor, power: float) -> Features:
    """As `linsight.ops.focus`, with the map still to be applied."""
    before, after = focus_scales(x.flatten(2), column.flatten(), power)
    return Features(x, "positive", power, column, before.detach(), after)


@torch.library.custom_op("linsight::focus_scales", mutates_args=())
def focus_scales(x: Tensor, column: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """1 / max(u), a constant, and |w| / |w^p| max(u): both `(B, N)` in the accumulator's dtype.

    `x` `(B, N, C)`, `column` `(C,)`; u = (relu(x) + 1e-6) column, w = u / max(u), p = `power`.
    """
    dtype = accumulator(x.dtype)
    before, after = (torch.empty(x.shape[:2], dtype=dtype, device=x.device) for _ in range(2))
    if not before.numel():
        return before, after
    chosen = _constants(x, power)
    with on(x):
        scales[(triton.cdiv(before.numel(), chosen["BLOCK_N"]),)](
            x,
            column.contiguous(),
            before,
            after,
            before.numel(),
            *x.shape[1:],
            *x.stride(),
            **chosen,
        )
    return before, after


@torch.library.custom_op("linsight::focus_scales_backward", mutates_args=())
def focus_scales_backward(
    grad: Tensor, x: Tensor, column: Tensor, before: Tensor, after: Tensor, power: float
) -> tuple[Tensor, Tensor]:
    """Gradients by `x` `(B, N, C)`, in its dtype, and by `column` `(C,)`, for `grad` `(B, N)` of the length."""
    by_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chosen = _constants(x, power)
    blocks = triton.cdiv(before.numel(), chosen["BLOCK_N"])
    by_column = torch.empty((min(blocks, _PROGRAMS), x.shape[2]), dtype=before.dtype, device=x.device)
    if by_column.numel():
        with on(x):
            scales_backward[(len(by_column),)](
                x,
                column.contiguous(),
                before,
                after,
                grad,
                by_x,
                by_column,
                before.numel(),
                *x.shape[1:],
                blocks,
                *x.stride(),
                *grad.stride(),
                POWER_BACK=_whole(2 * power - 1),
                WHOLE_BACK=isinstance(_whole(2 * power - 1), int),
                **chosen,
            )
    return by_x, by_column.sum(dim=0).to(column.dtype)


def _whole(power: float) -> float | int:
    """`power` as an integer where it is one, so that it is taken by products."""
    return int(power) if power == int(power) and 0 < power < 1024 else power


def _constants(x: Tensor, power: float) -> dict[str, Any]:
    """The constants that the kernels are compiled for."""
    lanes = triton.next_power_of_2(x.shape[2])
    return {
        "POWER": _whole(power),
        "WHOLE": isinstance(_whole(power), int),
        "ACCUMULATOR": ACCUMULATORS[accumulator(x.dtype)],
        "BLOCK_N": max(1, numbers(x, _BLOCK) // lanes),
        "BLOCK_C": lanes,
        "num_warps": min(16, max(4, lanes // 512)),
    }


@focus_scales.register_fake
def _(x: Tensor, column: Tensor, power: float) -> tuple[Tensor, Tensor]:
    dtype = accumulator(x.dtype)
    return x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


@focus_scales_backward.register_fake
def _(grad: Tensor, x: Tensor, column: Tensor, before: Tensor, after: Tensor, power: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), column.new_empty(column.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, column, ctx.power = inputs
    ctx.save_for_backward(x, column, *output)


def _backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*focus_scales_backward(grad, *ctx.saved_tensors, ctx.power), None)


focus_scales.register_autograd(_backward, setup_context=_keep)
