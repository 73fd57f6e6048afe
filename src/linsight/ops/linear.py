"""Normalised linear attention: o_i = phi(q_i) S / (phi(q_i) . z + eps), S = sum phi(k) v^T, z = sum phi(k).

Axes: B batch, N tokens, H heads, D query/key width, E value width. Queries and keys come with their feature map
(`Features`), or mapped already. Katharopoulos et al., "Transformers are RNNs", ICML 2020, equations 5 to 7.

A query reads a state by a product with a matrix, with or without a normaliser; what is added to that (`add`) joins in
the same pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .conv import Convolved, made
from .dispatch import fused_form
from .features import Features, as_features
from .sizes import unflatten
from .states import Moments, accumulator, apply_state, full_precision, mask_tokens, outer_sum

_CHUNK = 64  # causal: tokens that see each other through an explicit triangle


class LinearState(NamedTuple):
    """Sums over keys. kv: `(B, H, D, E)` sum phi(k) v^T.  k: `(B, H, D)` sum phi(k)."""

    kv: Tensor
    k: Tensor


def linear_absorb(k: Features | Tensor, v: Tensor, keep: Tensor | None = None) -> LinearState:
    """The state of keys `k` `(B, N, H, D)` and values `v` `(B, N, H, E)`; a rotation of `k` goes into `kv` alone."""
    compute = fused_form("linear_absorb", v) or plain_absorb
    return LinearState(*compute(as_features(k), v, keep))


def central_absorb(k: Features | Tensor, v: Tensor, keep: Tensor | None = None) -> Moments:
    """The central moments of keys `k` `(B, N, H, D)`, with their rotation, and of values `v` `(B, N, H, E)`."""
    compute = fused_form("central_absorb", v) or plain_central
    return Moments(*compute(as_features(k), v, keep))


def linear_read(
    q: Features | Tensor,
    state: LinearState,
    eps: float,
    *,
    add: Convolved | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """phi(q) S / (phi(q) . z + eps) + add, `(B, N, H, E)`, of queries `q` `(B, N, H, D)`.

    A rotation of `q` turns it above the line only. `add` `(B, n, H, E)`, n <= N, or a convolution still to be made, is
    added to the last n tokens, those behind the prefix. In `dtype`, or the state's.
    """
    q = as_features(q)
    compute = fused_form("linear_read", q.x) or plain_read
    return compute(q, state, eps, add, dtype or state.kv.dtype)


def affine_read(
    q: Features | Tensor,
    matrix: Tensor,
    shift: Tensor,
    *,
    add: Convolved | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """phi(q) M + c + add, `(B, N, H, E)`: a linear map of each image and head instead of a mean.

    `q` `(B, N, H, D)`, `matrix` `(B, H, D, E)`, `shift` `(B, H, E)`; `add` and `dtype` as for `linear_read`.
    """
    q = as_features(q)
    compute = fused_form("affine_read", q.x) or plain_affine
    return compute(q, matrix, shift, add, dtype or matrix.dtype)


def plain_absorb(k: Features, v: Tensor, keep: Tensor | None) -> LinearState:
    """`linear_absorb` by its definition."""
    dtype = accumulator(v.dtype)
    with full_precision(v):
        mapped, v = mask_tokens(k.mapped(), keep).to(dtype), mask_tokens(v, keep).to(dtype)
        return LinearState(outer_sum(k.turned(mapped), v), mapped.sum(dim=1))


def plain_central(k: Features, v: Tensor, keep: Tensor | None) -> Moments:
    """`central_absorb` by its definition."""
    return Moments.absorb(k.turned(k.mapped()), v, keep)


def plain_read(
    q: Features, state: LinearState, eps: float, add: Convolved | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_read` by its definition."""
    product, norm = products(q, state, eps)
    return _sum(product / norm, add).to(dtype)


def plain_affine(
    q: Features, matrix: Tensor, shift: Tensor, add: Convolved | Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`affine_read` by its definition."""
    return _sum(product(q, matrix) + shift[:, None], add).to(dtype)


def product(q: Features, matrix: Tensor) -> Tensor:
    """phi(q) M, `(B, N, H, E)`, in the dtype of the matrix."""
    mapped = q.mapped().to(matrix.dtype)
    with full_precision(mapped):
        return apply_state(q.turned(mapped), matrix)


def products(q: Features, state: LinearState, eps: float) -> tuple[Tensor, Tensor]:
    """The numerators and denominators of `linear_read`: `(B, N, H, E)` and `(B, N, H, 1)`."""
    mapped = q.mapped().to(state.kv.dtype)
    with full_precision(mapped):
        return apply_state(q.turned(mapped), state.kv), apply_state(mapped, state.k[..., None]) + eps


def _sum(out: Tensor, add: Convolved | Tensor | None) -> Tensor:
    """`add` plus `out`, in this order, because a sum is laid out as its first term."""
    add = made(add)
    if add is None:
        return out
    ahead = out.shape[1] - add.shape[1]
    return F.pad(add, (0, 0, 0, 0, ahead, 0)) + out if ahead else add + out


def linear_attention(
    q: Features | Tensor, k: Features | Tensor, v: Tensor, *, keep: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Every query reads every kept key. `q` `(B, M, H, D)`; `k` `(B, N, H, D)`; `v` `(B, N, H, E)`."""
    return linear_read(q, linear_absorb(k, v, keep), eps, dtype=v.dtype)


def causal_linear_attention(
    q: Features | Tensor,
    k: Features | Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    eps: float = 1e-6,
    before: LinearState | None = None,
) -> Tensor:
    """Query i reads kept keys j <= i only. `q`, `k` `(B, N, H, D)`; `v` `(B, N, H, E)`; cost O(N).

    `before` is the state of tokens in front of all of these.
    """
    product, norm = causal_products(q, k, v, before, keep)
    return (product / (norm + eps)).to(v.dtype)


def causal_products(
    q: Features | Tensor,
    k: Features | Tensor,
    v: Tensor,
    before: LinearState | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Numerators and denominators of `causal_linear_attention`, without eps: `(B, N, H, E)` and `(B, N, H, 1)`.

    In the accumulator's dtype. A rotation turns `q` and `k` in the numerators only.
    """
    q, k = as_features(q), as_features(k)
    queries, keys = q.mapped(), mask_tokens(k.mapped(), keep)
    v = mask_tokens(v, keep).to(accumulator(v.dtype))
    if q.turn is not None or k.turn is not None:
        sums, total = (None, None) if before is None else (before.kv, before.k[..., None])
        above = causal_product(q.turned(queries), k.turned(keys), v, before=sums)
        return above, causal_product(queries, keys, torch.ones_like(v[..., :1]), before=total)
    counted = F.pad(v, (0, 1), value=1.0)
    sums = None if before is None else torch.cat([before.kv, before.k[..., None]], dim=-1)
    out = causal_product(queries, keys, counted, before=sums)
    return out[..., :-1], out[..., -1:]


def causal_product(q: Tensor, k: Tensor, v: Tensor, *, before: Tensor | None = None) -> Tensor:
    """q_i sum_{j <= i} k_j v_j^T, `(B, N, H, E)`, in the accumulator's dtype, without a normaliser; cost O(N).

    Chunks of 64 tokens: a triangle inside a chunk, the running sum of the chunks before it. `before` `(B, H, D, E)` is
    that of tokens in front of all of these.
    """
    dtype, n = accumulator(v.dtype), v.shape[1]
    pad = -n % _CHUNK

    def chunked(x: Tensor) -> Tensor:  # (B, N, H, D) -> (B, H, chunks, 64, D); heads first: laid out so at any length
        return unflatten(F.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, pad)), 2, (-1, _CHUNK))

    with full_precision(v):
        qc, kc, vc = chunked(q), chunked(k), chunked(v)
        kv = kc.transpose(-1, -2) @ vc
        kv_before = F.pad(kv.cumsum(dim=2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
        if before is not None:
            kv_before = kv_before + before[:, :, None]
        out = (qc @ kc.transpose(-1, -2)).tril() @ vc + qc @ kv_before
        return out.flatten(2, 3)[:, :, :n].transpose(1, 2)
