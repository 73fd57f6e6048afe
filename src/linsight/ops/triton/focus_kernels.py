# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton templates of the factors of the focus map, all channels of a token in one program.

With u = (relu(x) + 1e-6) column and w = u / max(u), a token's length is |w| / |w^p| max(u). As w <= 1 is reached,
both norms are at least 1: nothing overflows, or is divided by zero.
"""

import triton
import triton.language as tl

from .maps import positive, relu_slope
from .tiles import narrow, raised


@triton.jit
def _token(x, n, count, tokens, x_image, x_token, lane, real, ACCUMULATOR: tl.constexpr):
    """Channels of tokens `n` of all images; and which exist."""
    seen = (n < count)[:, None] & real[None, :]
    place = (n // tokens) * x_image + (n % tokens) * x_token
    return tl.load(x + place[:, None] + lane[None, :], mask=seen, other=0).to(ACCUMULATOR), seen


@triton.jit(do_not_specialize=["count", "tokens"])
def scales(
    x,
    column,
    before,
    after,
    count,
    tokens,
    channels,
    x_image,
    x_token,
    x_channel,
    POWER: tl.constexpr,
    WHOLE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`before` = 1 / max(u) and `after` = the length, of a block of the `count` tokens of all images."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    real = c < channels
    value, seen = _token(x, n, count, tokens, x_image, x_token, c.to(tl.int64) * x_channel, real, ACCUMULATOR)
    scale = tl.load(column + c, mask=real, other=0).to(ACCUMULATOR)
    u = tl.where(seen, positive(value) * scale[None, :], 0)
    top = tl.where(n < count, tl.max(u, axis=1), 1)
    shrink = 1 / top
    w = u * shrink[:, None]
    powered = tl.where(seen, raised(w, POWER, WHOLE), 0)
    norm = tl.where(n < count, tl.sum(powered * powered, axis=1), 1)
    length = top * tl.sqrt(tl.sum(w * w, axis=1) / norm)
    tl.store(before + n, shrink, mask=n < count)
    tl.store(after + n, length, mask=n < count)


@triton.jit(do_not_specialize=["count", "tokens", "blocks"])
def scales_backward(
    x,
    column,
    before,
    after,
    grad,
    by_x,
    by_column,
    count,
    tokens,
    channels,
    blocks,
    x_image,
    x_token,
    x_channel,
    grad_image,
    grad_token,
    POWER: tl.constexpr,
    WHOLE: tl.constexpr,
    POWER_BACK: tl.constexpr,
    WHOLE_BACK: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`grad` of the length, max(u) a constant: into `by_x` (B, N, C), and summed into a row of `by_column`.

    d length / du = length / max(u) (w / |w|^2 - p w^(2p-1) / |w^p|^2). POWER_BACK is 2p - 1.
    """
    c = tl.arange(0, BLOCK_C)
    real = c < channels
    lane = c.to(tl.int64)
    scale = tl.load(column + c, mask=real, other=0).to(ACCUMULATOR)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), ACCUMULATOR)
    row = tl.arange(0, BLOCK_N).to(tl.int64)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        n = row + block * BLOCK_N
        known = n < count
        value, seen = _token(x, n, count, tokens, x_image, x_token, lane * x_channel, real, ACCUMULATOR)
        shrink = tl.load(before + n, mask=known, other=1)
        length = tl.load(after + n, mask=known, other=0)
        place = (n // tokens) * grad_image + (n % tokens) * grad_token
        g = tl.load(grad + place, mask=known, other=0).to(ACCUMULATOR) * length * shrink
        base = positive(value)
        w = base * scale * shrink[:, None]
        powered = tl.where(seen, raised(w, POWER, WHOLE), 0)
        square = tl.sum(tl.where(seen, w * w, 0), axis=1)
        powered_square = tl.sum(powered * powered, axis=1)
        first = w / tl.where(known, square, 1)[:, None]
        second = POWER * raised(w, POWER_BACK, WHOLE_BACK) / tl.where(known, powered_square, 1)[:, None]
        by_u = tl.where(seen, g[:, None] * (first - second), 0)
        total += by_u * base
        out = narrow(by_u * scale * relu_slope(value), by_x.dtype.element_ty)
        tl.store(by_x + n[:, None] * channels + lane[None, :], out, mask=seen)
    tl.store(by_column + tl.program_id(0).to(tl.int64) * channels + lane, tl.sum(total, axis=0), mask=real)
