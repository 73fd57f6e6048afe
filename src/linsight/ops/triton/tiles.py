# mypy: allow-untyped-defs, allow-incomplete-defs
"""The parts of every kernel on a block of tokens: read it, map it, turn it, multiply it.

Names: n indices of tokens, ok which of them count, c (d, e) indices of channels. Tiles are (tokens, channels).
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load_rows(x, n, ok, c, stride_n, stride_c, WIDTH: tl.constexpr):
    """Channels `c` of the tokens `n` of one image and head, 0 where not `ok`, in their own dtype."""
    mask = ok[:, None]
    if c.shape[0] != WIDTH:
        mask = mask & (c < WIDTH)[None, :]
    # 64-bit offsets: a batch of large images has more elements than 2^31.
    return tl.load(x + n.to(tl.int64)[:, None] * stride_n + c.to(tl.int64)[None, :] * stride_c, mask=mask, other=0.0)


@triton.jit
def store_rows(x, n, ok, c, stride_n, value, WIDTH: tl.constexpr):
    """Store `value` in a tensor whose channels lie side by side."""
    mask = ok[:, None]
    if c.shape[0] != WIDTH:
        mask = mask & (c < WIDTH)[None, :]
    tl.store(x + n.to(tl.int64)[:, None] * stride_n + c[None, :], narrow(value, x.dtype.element_ty), mask=mask)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x` in `dtype`, to the nearest: the interpreter cuts float32 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.int32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _half_dot(a, b, acc):
    """acc + a b of half tiles: their products are exact in float32."""
    if INTERPRETED:  # which multiplies the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def product(a, b, acc, SPLIT: tl.constexpr):
    """acc + a b.

    With SPLIT, for half tokens: float32 factors are the sum of two bfloat16, that is 16 bits of mantissa and the
    range of float32; half factors are taken as they are. As many tensor core cycles as TF32, which has 11 bits.
    """
    if not SPLIT:
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        return _half_dot(a, b, acc)
    else:
        high_a, high_b = narrow(a, tl.bfloat16), narrow(b, tl.bfloat16)
        if a.dtype != tl.bfloat16:
            acc = _half_dot(narrow(a.to(tl.float32) - high_a.to(tl.float32), tl.bfloat16), high_b, acc)
        if b.dtype != tl.bfloat16:
            acc = _half_dot(high_a, narrow(b.to(tl.float32) - high_b.to(tl.float32), tl.bfloat16), acc)
        return _half_dot(high_a, high_b, acc)


@triton.jit
def raised(y, POWER: tl.constexpr, WHOLE: tl.constexpr):
    """y^POWER; a whole power by squaring, so that y may be negative."""
    if WHOLE:
        power, square = tl.full(y.shape, 1.0, y.dtype), y
        for bit in tl.static_range(0, 10):
            if (POWER >> bit) & 1:
                power = power * square
            if POWER >> (bit + 1):
                square = square * square
    else:
        some = y > 0
        power = tl.exp2(tl.log2(tl.where(some, y, 1.0)) * POWER)
        power = tl.where(some, power, tl.where(y < 0, float("nan"), 0.0 if POWER > 0 else float("inf")))
    return power


@triton.jit
def _load_column(factors, h, d, D: tl.constexpr):
    return tl.load(factors[0] + h * D + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def _load_token_factor(factor, n, ok, b, tokens):
    return tl.load(factor + b * tokens + n, mask=ok, other=1.0)[:, None]


@triton.jit
def _before_power(x, n, ok, d, b, h, factors, tokens, MAP: tl.constexpr, D: tl.constexpr):
    y = MAP(x)
    if factors[0] is not None:
        y = y * _load_column(factors, h, d, D)
    if factors[1] is not None:
        y = y * _load_token_factor(factors[1], n, ok, b, tokens)
    return y


@triton.jit
def phi(
    x, n, ok, d, b, h, factors, tokens,
    MAP: tl.constexpr, POWER: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The features of the tokens `x` of image b and head h, 0 where not `ok`.

    factors: column `(H, D)`, before `(B, N)` and after `(B, N)`, each of which may be None.
    """
    y = _before_power(x, n, ok, d, b, h, factors, tokens, MAP, D)
    if POWER != 1:
        y = raised(y, POWER, WHOLE)
    if factors[2] is not None:
        y = y * _load_token_factor(factors[2], n, ok, b, tokens)
    return tl.where(ok[:, None], y, 0.0)


@triton.jit
def phi_backward(
    dy, x, n, ok, inside, d, b, h, factors, dafter, dcolumn, tokens, heads,
    MAP: tl.constexpr, SLOPE: tl.constexpr, POWER: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The gradient of `x` from `dy`, that of phi(x), which is 0 where not `ok`; and `dcolumn` with its share.

    The gradient of `after`, `(B, N, H)`, is stored for the tokens `inside`.
    """
    y = _before_power(x, n, ok, d, b, h, factors, tokens, MAP, D)
    if factors[2] is not None:
        powered = y
        if POWER != 1:
            powered = raised(y, POWER, WHOLE)
        tl.store(dafter + (b * tokens + n) * heads + h, tl.sum(dy * powered, axis=1), mask=inside)
        dy = dy * _load_token_factor(factors[2], n, ok, b, tokens)
    if POWER != 1:
        dy = dy * (raised(y, POWER - 1, WHOLE) * POWER)
    if factors[1] is not None:
        dy = dy * _load_token_factor(factors[1], n, ok, b, tokens)
    if factors[0] is not None:
        dcolumn += tl.sum(dy * MAP(x), axis=0)
        dy = dy * _load_column(factors, h, d, D)
    return dy * SLOPE(x), dcolumn


@triton.jit
def load_places(turn, n, ok, h, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(cos, sin) `(tokens, BLOCK_D / 2)` of the pairs of channels of head h; see `linsight.ops.rotary`.

    turn: cos, sin, height, width, prefix and heads; the tables have a row for each row and then for each column of the
    grid. What is left over of a head has cos 1 and sin 0.
    """
    i = tl.arange(0, BLOCK_D // 2)
    part = heads * D // turn[5]  # channels that have all speeds
    quarter = part // 4
    pair = (h * (D // 2) + i) % (part // 2)
    place = n - turn[4]
    by_row = pair < quarter
    line = tl.where(by_row[None, :], (place // turn[3])[:, None], (turn[2] + place % turn[3])[:, None])
    at = line * quarter + tl.where(by_row, pair, pair - quarter)[None, :]
    mask = (ok & (place >= 0))[:, None] & ((i < D // 2) & (pair < 2 * quarter))[None, :]
    return tl.load(turn[0] + at, mask=mask, other=1.0), tl.load(turn[1] + at, mask=mask, other=0.0)


@triton.jit
def turned(x, cos, sin):
    """Channels (2i, 2i + 1) of `x` turned by their angles."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2))
    a, b = tl.split(pairs)
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), x.shape)
