"""Depthwise convolutions on tokens in Triton: any strides, nothing laid out anew, sums in float32 or float64.

One operator serves all: images share their kernels, or have one each; its adjoint, with the taps flipped, is the
gradient by x. Sums over tokens, for gradients by kernels and bias, are made in slices and folded in a second step:
they do not depend on the order in which programs run.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from linsight.errors import LinsightError

from ..states import accumulator
from .conv_kernels import convolve, correlate
from .launch import on
from .sizes import ACCUMULATORS, numbers

_BLOCK = 2048  # numbers of an output block; sums hold twice as many
_PROGRAMS = 2048  # about as many as fill a GPU


def depthwise_conv(x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linsight.ops.depthwise_conv`."""
    kind, dtype = x.device.type, weight.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return token_conv(x, size[0], size[1], weight.transpose(0, 1), bias, False, dtype)


def dynamic_depthwise_conv(x: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
    """As `linsight.ops.dynamic_depthwise_conv`."""
    return token_conv(x, size[0], size[1], kernels, None, False, kernels.dtype)


@torch.library.custom_op("linsight::token_conv", mutates_args=())
def token_conv(
    x: Tensor, height: int, width: int, kernels: Tensor, bias: Tensor | None, adjoint: bool, dtype: torch.dtype
) -> Tensor:
    """Convolution of `x` `(B, H*W, C)` by `kernels` `(B or 1, C, k, k)`, or its adjoint, in `dtype`: `(B, H*W, C)`.

    Raises:
        LinsightError: shapes that do not fit, or an even k.
    """
    batch, tokens, channels = x.shape
    side = kernels.shape[-1]
    shared = kernels.shape[0] == 1
    fits = tokens == height * width and tuple(kernels.shape) in (
        (batch, channels, side, side),
        (1, channels, side, side),
    )
    if not fits or side % 2 == 0:
        raise LinsightError(
            f"tokens of shape {tuple(x.shape)} and kernels of shape {tuple(kernels.shape)} do not fit a grid of "
            f"{height}x{width}: pass (batch, height * width, channels) and (batch or 1, channels, k, k) with an odd k"
        )
    out = torch.empty((batch, tokens, channels), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    block = min(64, triton.next_power_of_2(channels))
    rows = max(1, numbers(x, _BLOCK) // block)
    programs = batch * triton.cdiv(tokens, rows) * triton.cdiv(channels, block)
    taps = kernels.flatten(2).transpose(1, 2).contiguous()  # channels side by side, as in x
    with on(x):
        convolve[(programs,)](
            x,
            taps,
            taps if bias is None else bias.contiguous(),
            out,
            height,
            width,
            channels,
            *x.stride(),
            0 if shared else taps.stride(0),
            SIDE=side,
            ADJOINT=adjoint,
            BIAS=bias is not None,
            ACCUMULATOR=ACCUMULATORS[accumulator(kernels.dtype)],
            BLOCK_N=rows,
            BLOCK_C=block,
        )
    return out


@torch.library.custom_op("linsight::token_conv_sums", mutates_args=())
def token_conv_sums(x: Tensor, grad: Tensor, height: int, width: int, groups: int, side: int) -> tuple[Tensor, Tensor]:
    """Gradients by kernels `(groups, C, k, k)` and by bias `(C,)`, in the accumulator's dtype.

    `x`, `grad` `(B, H*W, C)`; `groups` is B, or 1 where images share their kernels.
    """
    batch, tokens, channels = x.shape
    images = batch // groups
    row = triton.next_power_of_2(side)
    block = min(64, triton.next_power_of_2(channels))
    rows = max(1, numbers(x, 2 * _BLOCK) // (row * block))
    columns = triton.cdiv(channels, block)
    slices = max(1, min(images * triton.cdiv(tokens, rows), _PROGRAMS // (groups * columns * side)))
    dtype = torch.promote_types(accumulator(x.dtype), accumulator(grad.dtype))
    by_taps = torch.empty((groups, slices, channels, side, side), dtype=dtype, device=x.device)
    by_bias = torch.empty((groups, slices, channels), dtype=dtype, device=x.device)
    if by_taps.numel():
        with on(x):
            correlate[(groups * slices * columns * side,)](
                x,
                grad,
                by_taps,
                by_bias,
                height,
                width,
                channels,
                images,
                slices,
                *x.stride(),
                *grad.stride(),
                SIDE=side,
                ROW=row,
                ACCUMULATOR=ACCUMULATORS[dtype],
                BLOCK_N=rows,
                BLOCK_C=block,
            )
    return by_taps.sum(dim=1), by_bias.sum(dim=(0, 1))


@token_conv.register_fake
def _(x: Tensor, height: int, width: int, kernels: Tensor, bias: Any, adjoint: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@token_conv_sums.register_fake
def _(x: Tensor, grad: Tensor, height: int, width: int, groups: int, side: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(accumulator(x.dtype), accumulator(grad.dtype))
    channels = x.shape[-1]
    return x.new_empty((groups, channels, side, side), dtype=dtype), x.new_empty((channels,), dtype=dtype)


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.height, ctx.width, kernels, bias, ctx.adjoint, _ = inputs
    ctx.save_for_backward(x, kernels)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x, kernels), by_x, by_kernels, by_bias = ctx.saved_tensors, None, None, None
    if ctx.needs_input_grad[0]:
        by_x = token_conv(grad, ctx.height, ctx.width, kernels, None, not ctx.adjoint, x.dtype)
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        side = kernels.shape[-1]
        by_kernels, total = token_conv_sums(x, grad, ctx.height, ctx.width, kernels.shape[0], side)
        by_kernels = (by_kernels.flip((-2, -1)) if ctx.adjoint else by_kernels).to(kernels.dtype)
        by_bias = None if ctx.bias_dtype is None else total.to(ctx.bias_dtype)
    return by_x, None, None, by_kernels, by_bias, None, None


def _keep_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, grad, ctx.height, ctx.width, _, _ = inputs
    ctx.save_for_backward(x, grad)


def _sums_backward(ctx: Any, by_kernels: Tensor, by_bias: Tensor) -> tuple[Any, ...]:
    x, grad = ctx.saved_tensors
    by_x = token_conv(grad, ctx.height, ctx.width, by_kernels, None, True, x.dtype)
    by_grad = token_conv(x, ctx.height, ctx.width, by_kernels, by_bias, False, grad.dtype)
    return by_x, by_grad, None, None, None, None


token_conv.register_autograd(_conv_backward, setup_context=_keep_conv)
token_conv_sums.register_autograd(_sums_backward, setup_context=_keep_sums)
