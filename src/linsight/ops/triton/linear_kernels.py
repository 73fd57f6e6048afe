# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernels of linear attention: one template for absorb and one for read, forward and backward.

A program has one image and head, and one share of the tokens, which it walks in blocks; sums over tokens leave it
as partial sums, which `fold_kernel` adds in a fixed order. So nothing depends on timing.

Tensor arguments with `_strides` are `(B, N, H, ...)` of any strides; `keep` is `(B, N)`; outputs and states are
contiguous. For `factors` and `turn` see `tiles.py`.
"""

import triton
import triton.language as tl

from .tiles import load_places, load_rows, phi, phi_backward, product, store_rows, turned


@triton.jit
def _kept(keep, keep_strides, n, inside, b):
    """True for the tokens that count."""
    if keep is None:
        return inside
    else:
        return inside & (
            tl.load(keep + b * keep_strides[0] + n.to(tl.int64) * keep_strides[1], mask=inside, other=0) != 0
        )


@triton.jit
def _load_matrix(matrix, at, d, e, D: tl.constexpr, E: tl.constexpr):
    """State `at`, `(D, E)`, 0 beyond its widths."""
    mask = (d < D)[:, None] & (e < E)[None, :]
    return tl.load(matrix + at * D * E + d[:, None] * E + e[None, :], mask=mask, other=0.0)


@triton.jit
def _store_matrix(matrix, at, d, e, value, D: tl.constexpr, E: tl.constexpr):
    mask = (d < D)[:, None] & (e < E)[None, :]
    tl.store(matrix + at * D * E + d[:, None] * E + e[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["tokens", "share"])
def absorb_kernel(
    x, x_strides, factors, turn, v, v_strides, keep, keep_strides, matrix, left, right, count, tokens, heads, share,
    MAP: tl.constexpr, POWER: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr,
    CENTRAL: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Partial sums `(splits, B H, ...)`: matrix sum phi(k) v^T (turned), left sum phi(k).

    CENTRAL: matrix sum (phi(k) - mean)(v - mean)^T of turned phi(k), left and right the means, and count.
    """
    ACC: tl.constexpr = matrix.dtype.element_ty
    image_head = tl.program_id(0).to(tl.int64)
    b, h = image_head // heads, image_head % heads
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    x += b * x_strides[0] + h * x_strides[2]
    v += b * v_strides[0] + h * v_strides[2]
    total = tl.zeros((BLOCK_D, BLOCK_E), ACC)
    if CENTRAL:
        mean_k, mean_v = tl.zeros((BLOCK_D,), ACC), tl.zeros((BLOCK_E,), ACC)
        seen = tl.sum(mean_k)
    else:
        spread = tl.zeros((BLOCK_N, BLOCK_D), ACC)  # summed over tokens once, at the end
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = _kept(keep, keep_strides, n, n < last, b)
        raw = load_rows(x, n, ok, d, x_strides[1], x_strides[3], D)
        values = load_rows(v, n, ok, e, v_strides[1], v_strides[3], E)
        mapped = phi(raw.to(ACC), n, ok, d, b, h, factors, tokens, MAP, POWER, WHOLE, D)
        if not CENTRAL:
            spread += mapped  # as it is
        if turn is not None:
            cos, sin = load_places(turn, n, ok, h, heads, D, BLOCK_D)
            mapped = turned(mapped, cos, sin)
        if CENTRAL:  # merged with what was seen before, after Chan, Golub and LeVeque
            values = values.to(ACC)
            fresh = tl.sum(ok.to(ACC))
            part = 1 / tl.maximum(fresh, 1)
            block_k, block_v = tl.sum(mapped, axis=0) * part, tl.sum(values, axis=0) * part
            step_k, step_v = block_k - mean_k, block_v - mean_v
            weight = fresh / tl.maximum(seen + fresh, 1)
            total += (seen * weight) * step_k[:, None] * step_v[None, :]
            centred = tl.where(ok[:, None], mapped - block_k[None, :], 0.0)
            total = product(tl.trans(centred), values - block_v[None, :], total, SPLIT)
            mean_k += step_k * weight
            mean_v += step_v * weight
            seen += fresh
        else:
            if EXACT:
                mapped = mapped.to(raw.dtype)
            total = product(tl.trans(mapped), values, total, SPLIT)
    at = tl.program_id(1) * tl.num_programs(0).to(tl.int64) + image_head
    _store_matrix(matrix, at, d, e, total, D, E)
    if CENTRAL:
        tl.store(left + at * D + d, mean_k, mask=d < D)
        tl.store(right + at * E + e, mean_v, mask=e < E)
        tl.store(count + at, seen)
    else:
        tl.store(left + at * D + d, tl.sum(spread, axis=0), mask=d < D)


@triton.jit(do_not_specialize=["tokens", "share"])
def absorb_backward_kernel(
    x, x_strides, factors, turn, v, v_strides, keep, keep_strides,
    mean_k, mean_v, count, dmatrix, dleft, dright, dx, dv, dcolumn, dafter, tokens, heads, share,
    MAP: tl.constexpr, SLOPE: tl.constexpr, POWER: tl.constexpr, WHOLE: tl.constexpr,
    EXACT: tl.constexpr, SPLIT: tl.constexpr, CENTRAL: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx and dv `(B, N, H, .)`, dcolumn `(splits, B H, D)` and dafter `(B, N, H)`.

    Means, count `(B,)` and dright are for CENTRAL alone.
    """
    ACC: tl.constexpr = dmatrix.dtype.element_ty
    image_head = tl.program_id(0).to(tl.int64)
    b, h = image_head // heads, image_head % heads
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    x += b * x_strides[0] + h * x_strides[2]
    v += b * v_strides[0] + h * v_strides[2]
    dx += (b * tokens * heads + h) * D
    dv += (b * tokens * heads + h) * E
    dstate = _load_matrix(dmatrix, image_head, d, e, D, E)
    dsum = tl.load(dleft + image_head * D + d, mask=d < D, other=0.0)
    if CENTRAL:
        centre_k = tl.load(mean_k + image_head * D + d, mask=d < D, other=0.0)
        centre_v = tl.load(mean_v + image_head * E + e, mask=e < E, other=0.0)
        part = 1 / tl.maximum(tl.load(count + b), 1)
        dsum = dsum * part
        dmean = tl.load(dright + image_head * E + e, mask=e < E, other=0.0) * part
    dscale = tl.zeros((BLOCK_D,), ACC)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < last
        ok = _kept(keep, keep_strides, n, inside, b)
        raw = load_rows(x, n, ok, d, x_strides[1], x_strides[3], D)
        values = load_rows(v, n, ok, e, v_strides[1], v_strides[3], E)
        wide = raw.to(ACC)
        if not SPLIT:  # else held in registers for good
            dstate = _load_matrix(dmatrix, image_head, d, e, D, E)
        mapped = phi(wide, n, ok, d, b, h, factors, tokens, MAP, POWER, WHOLE, D)
        if turn is not None:
            cos, sin = load_places(turn, n, ok, h, heads, D, BLOCK_D)
            mapped = turned(mapped, cos, sin)
        if CENTRAL:
            mapped = mapped - centre_k[None, :]
            values = values.to(ACC) - centre_v[None, :]
        if EXACT:
            mapped = mapped.to(raw.dtype)
        dvalues = product(mapped, dstate, tl.zeros((BLOCK_N, BLOCK_E), ACC), SPLIT)
        if CENTRAL:
            dvalues += dmean[None, :]
        store_rows(dv, n, inside, e, heads * E, tl.where(ok[:, None], dvalues, 0.0), E)
        dmapped = product(values, tl.trans(dstate), tl.zeros((BLOCK_N, BLOCK_D), ACC), SPLIT)
        if CENTRAL:  # the mean is of turned keys
            dmapped += dsum[None, :]
        if turn is not None:
            dmapped = turned(dmapped, cos, -sin)
        if not CENTRAL:
            dmapped += dsum[None, :]
        dmapped = tl.where(ok[:, None], dmapped, 0.0)
        dmapped, dscale = phi_backward(
            dmapped, wide, n, ok, inside, d, b, h, factors, dafter, dscale, tokens, heads, MAP, SLOPE, POWER, WHOLE, D
        )
        store_rows(dx, n, inside, d, heads * D, dmapped, D)
    if factors[0] is not None:
        at = tl.program_id(1) * tl.num_programs(0).to(tl.int64) + image_head
        tl.store(dcolumn + at * D + d, dscale, mask=d < D)


@triton.jit(do_not_specialize=["tokens", "share", "ahead"])
def read_kernel(
    x, x_strides, factors, turn, matrix, vector, add, add_strides, ahead, out, eps, tokens, heads, share,
    MAP: tl.constexpr, POWER: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr,
    NORMALISED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out `(B, N, H, E)`: phi(q) matrix, turned, over phi(q) . vector + eps where NORMALISED, else + vector.

    Plus `add`, behind the first tokens, `ahead`.
    """
    ACC: tl.constexpr = matrix.dtype.element_ty
    image_head = tl.program_id(0).to(tl.int64)
    b, h = image_head // heads, image_head % heads
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    x += b * x_strides[0] + h * x_strides[2]
    out += (b * tokens * heads + h) * E
    if add is not None:
        add += b * add_strides[0] + h * add_strides[2]
    state = _load_matrix(matrix, image_head, d, e, D, E)
    if NORMALISED:
        total = tl.load(vector + image_head * D + d, mask=d < D, other=0.0)
    else:
        shift = tl.load(vector + image_head * E + e, mask=e < E, other=0.0)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = n < last
        raw = load_rows(x, n, ok, d, x_strides[1], x_strides[3], D)
        if not SPLIT:  # else held in registers for good
            state = _load_matrix(matrix, image_head, d, e, D, E)
        mapped = phi(raw.to(ACC), n, ok, d, b, h, factors, tokens, MAP, POWER, WHOLE, D)
        if NORMALISED:
            norm = tl.where(ok, tl.sum(mapped * total[None, :], axis=1) + eps, 1.0)
        if turn is not None:
            cos, sin = load_places(turn, n, ok, h, heads, D, BLOCK_D)
            mapped = turned(mapped, cos, sin)
        if EXACT:
            mapped = mapped.to(raw.dtype)
        result = product(mapped, state, tl.zeros((BLOCK_N, BLOCK_E), ACC), SPLIT)
        if NORMALISED:
            result = result / norm[:, None]
        else:
            result += shift[None, :]
        if add is not None:
            result += load_rows(add, n - ahead, ok & (n >= ahead), e, add_strides[1], add_strides[3], E).to(ACC)
        store_rows(out, n, ok, e, heads * E, result, E)


@triton.jit(do_not_specialize=["tokens", "share"])
def read_backward_kernel(
    x, x_strides, factors, turn, matrix, vector, dout, dout_strides,
    dx, dmatrix, dvector, dcolumn, dafter, eps, tokens, heads, share,
    MAP: tl.constexpr, SLOPE: tl.constexpr, POWER: tl.constexpr, WHOLE: tl.constexpr,
    EXACT: tl.constexpr, SPLIT: tl.constexpr, NORMALISED: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx `(B, N, H, D)`; partial sums dmatrix, dvector and dcolumn `(splits, B H, ...)`; dafter `(B, N, H)`.

    With r = 1 / norm and u = dout matrix^T: dphi = u r turned back - (phi . u) r^2 vector, without the output.
    """
    ACC: tl.constexpr = matrix.dtype.element_ty
    image_head = tl.program_id(0).to(tl.int64)
    b, h = image_head // heads, image_head % heads
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    x += b * x_strides[0] + h * x_strides[2]
    dout += b * dout_strides[0] + h * dout_strides[2]
    dx += (b * tokens * heads + h) * D
    state = _load_matrix(matrix, image_head, d, e, D, E)
    dstate, dscale = tl.zeros((BLOCK_D, BLOCK_E), ACC), tl.zeros((BLOCK_D,), ACC)
    if NORMALISED:
        total = tl.load(vector + image_head * D + d, mask=d < D, other=0.0)
        spread = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    else:
        spread = tl.zeros((BLOCK_N, BLOCK_E), ACC)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = n < last
        raw = load_rows(x, n, ok, d, x_strides[1], x_strides[3], D)
        slope = load_rows(dout, n, ok, e, dout_strides[1], dout_strides[3], E)
        wide = raw.to(ACC)
        mapped = phi(wide, n, ok, d, b, h, factors, tokens, MAP, POWER, WHOLE, D)
        if not SPLIT:  # else held in registers for good
            state = _load_matrix(matrix, image_head, d, e, D, E)
        seen = mapped
        if turn is not None:
            cos, sin = load_places(turn, n, ok, h, heads, D, BLOCK_D)
            seen = turned(mapped, cos, sin)
        dmapped = product(slope, tl.trans(state), tl.zeros((BLOCK_N, BLOCK_D), ACC), SPLIT)
        if NORMALISED:
            share_of = 1 / tl.where(ok, tl.sum(mapped * total[None, :], axis=1) + eps, 1.0)
            dmapped = dmapped * share_of[:, None]
            seen = seen * share_of[:, None]
            dnorm = -tl.sum(seen * dmapped, axis=1)
            spread += mapped * dnorm[:, None]
        else:
            spread += slope.to(ACC)
            if EXACT:
                seen = seen.to(raw.dtype)
        dstate = product(tl.trans(seen), slope, dstate, SPLIT)
        if turn is not None:
            dmapped = turned(dmapped, cos, -sin)
        if NORMALISED:
            dmapped += dnorm[:, None] * total[None, :]
        dmapped, dscale = phi_backward(
            dmapped, wide, n, ok, ok, d, b, h, factors, dafter, dscale, tokens, heads, MAP, SLOPE, POWER, WHOLE, D
        )
        store_rows(dx, n, ok, d, heads * D, dmapped, D)
    at = tl.program_id(1) * tl.num_programs(0).to(tl.int64) + image_head
    _store_matrix(dmatrix, at, d, e, dstate, D, E)
    if NORMALISED:
        tl.store(dvector + at * D + d, tl.sum(spread, axis=0), mask=d < D)
    else:
        tl.store(dvector + at * E + e, tl.sum(spread, axis=0), mask=e < E)
    if factors[0] is not None:
        tl.store(dcolumn + at * D + d, dscale, mask=d < D)


@triton.jit(do_not_specialize=["splits"])
def fold_kernel(
    matrix, left, right, count, out_matrix, out_left, out_right, splits,
    CENTRAL: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_S: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The partial sums `(splits, B H, ...)` added: ROWS rows of a matrix a program, all splits at once.

    left, right: `(splits, B H, D or E)` or None. CENTRAL: cross products about the mean of all, from those about the
    mean of each part, which are left and right.
    """
    image_head = tl.program_id(0).to(tl.int64)
    d, e = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    at = s * tl.num_programs(0).to(tl.int64) + image_head
    there, row, column = s < splits, d < D, e < E
    mask = there[:, None, None] & row[None, :, None] & column[None, None, :]
    tiles = tl.load(matrix + (at[:, None, None] * D + d[None, :, None]) * E + e[None, None, :], mask=mask, other=0.0)
    total = tl.sum(tiles, axis=0)
    if left is not None:
        lefts = tl.load(left + at[:, None] * D + d[None, :], mask=there[:, None] & row[None, :], other=0.0)
    if right is not None:
        rights = tl.load(right + at[:, None] * E + e[None, :], mask=there[:, None] & column[None, :], other=0.0)
    if CENTRAL:
        seen = tl.load(count + at, mask=there, other=0.0)
        weight = (seen / tl.maximum(tl.sum(seen), 1))[:, None]
        sum_left, sum_right = tl.sum(lefts * weight, axis=0), tl.sum(rights * weight, axis=0)
        off_left, off_right = (lefts - sum_left[None, :]) * seen[:, None], rights - sum_right[None, :]
        total += tl.sum(off_left[:, :, None] * off_right[:, None, :], axis=0)
    else:
        if left is not None:
            sum_left = tl.sum(lefts, axis=0)
        if right is not None:
            sum_right = tl.sum(rights, axis=0)
    _store_matrix(out_matrix, image_head, d, e, total, D, E)
    if left is not None:
        tl.store(out_left + image_head * D + d, sum_left, mask=row)
    if right is not None:  # noqa: SIM102 -- decided when compiled
        if tl.program_id(1) == 0:
            tl.store(out_right + image_head * E + e, sum_right, mask=column)
