# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton templates of depthwise convolutions on tokens.

Addresses are in int64; places on one grid, of fewer than 2^31 tokens, are divided by its width in int32.
"""

import triton
import triton.language as tl

from .tiles import narrow


@triton.jit(do_not_specialize=["height", "width"])
def convolve(
    x,
    kernels,
    bias,
    out,
    height,
    width,
    channels,
    x_image,
    x_token,
    x_channel,
    kernels_image,
    SIDE: tl.constexpr,
    ADJOINT: tl.constexpr,
    BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of tokens and channels of `out` (B, N, C). Taps lie as (G, SIDE * SIDE, C), flipped where ADJOINT.

    Taps other than the first find their tokens in the caches.
    """
    program = tl.program_id(0)
    tokens = height * width
    channel_blocks, token_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(tokens, BLOCK_N)
    image = (program // channel_blocks // token_blocks).to(tl.int64)
    n = (program // channel_blocks % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < channels
    row, column = n // width, n % width
    source = x + image * x_image + c[None, :].to(tl.int64) * x_channel
    taps = kernels + image * kernels_image + c
    total = tl.zeros((BLOCK_N, BLOCK_C), ACCUMULATOR)
    for i in range(SIDE):  # not unrolled: 25 taps at once would spill
        down = i - SIDE // 2
        level = (row + down >= 0) & (row + down < height)
        for j in tl.static_range(SIDE):
            right = j - SIDE // 2
            inside = level & (column + right >= 0) & (column + right < width)
            place = (n + down * width + right).to(tl.int64)[:, None] * x_token
            value = tl.load(source + place, mask=inside[:, None] & real[None, :], other=0).to(ACCUMULATOR)
            t = i * SIDE + j
            if ADJOINT:
                t = SIDE * SIDE - 1 - t
            tap = tl.load(taps + t * channels, mask=real, other=0).to(ACCUMULATOR)
            total += value * tap[None, :]
    if BIAS:
        total += tl.load(bias + c, mask=real, other=0).to(ACCUMULATOR)[None, :]
    target = out + (image * tokens + n[:, None]) * channels + c[None, :]
    tl.store(target, narrow(total, out.dtype.element_ty), mask=(n < tokens)[:, None] & real[None, :])


@triton.jit(do_not_specialize=["height", "width", "images", "slices"])
def correlate(
    x,
    grad,
    by_taps,
    by_bias,
    height,
    width,
    channels,
    images,
    slices,
    x_image,
    x_token,
    x_channel,
    grad_image,
    grad_token,
    grad_channel,
    SIDE: tl.constexpr,
    ROW: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over a slice of the tokens of a group of `images` images.

    One row of taps a program: grad at n times x at n + tap, into `by_taps` (G, slices, C, SIDE, SIDE); and grad,
    into `by_bias` (G, slices, C). ROW is the power of 2 that holds SIDE.
    """
    program = tl.program_id(0)
    tokens = height * width
    channel_blocks, token_blocks = tl.cdiv(channels, BLOCK_C), tl.cdiv(tokens, BLOCK_N)
    down = program % SIDE
    c = (program // SIDE % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = (program // SIDE // channel_blocks).to(tl.int64)  # group * slices + slice
    first = (place // slices) * images
    real = c < channels
    wide = c[None, :].to(tl.int64)
    t = tl.arange(0, ROW)
    shift = t[:, None] - SIDE // 2
    total = tl.zeros((ROW, BLOCK_N, BLOCK_C), ACCUMULATOR)
    plain = tl.zeros((BLOCK_N, BLOCK_C), ACCUMULATOR)
    for block in range((place % slices).to(tl.int32), images * token_blocks, slices):
        image = first + block // token_blocks
        n = (block % token_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = (n < tokens)[:, None] & real[None, :]
        at = image * grad_image + n[:, None].to(tl.int64) * grad_token + wide * grad_channel
        g = tl.load(grad + at, mask=seen, other=0).to(ACCUMULATOR)
        row, column = n // width + down - SIDE // 2, (n % width)[None, :] + shift
        inside = (t < SIDE)[:, None] & (column >= 0) & (column < width) & ((row >= 0) & (row < height))[None, :]
        where = (n + (down - SIDE // 2) * width)[None, :] + shift
        at = image * x_image + where[:, :, None].to(tl.int64) * x_token + wide[None, :, :] * x_channel
        value = tl.load(x + at, mask=inside[:, :, None] & seen[None, :, :], other=0).to(ACCUMULATOR)
        total += value * g[None, :, :]
        plain += g
    column = place * channels + c
    target = by_taps + (column[None, :] * SIDE + down) * SIDE + t[:, None]
    tl.store(target, tl.sum(total, axis=1), mask=(t < SIDE)[:, None] & real[None, :])
    if down == 0:
        tl.store(by_bias + column, tl.sum(plain, axis=0), mask=real)
