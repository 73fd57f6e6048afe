"""Normalised linear attention: o_i = phi(q_i) S / (phi(q_i) . z + eps), S = sum phi(k) v^T, z = sum phi(k).

Axes: B batch, N tokens, H heads, D query/key width, E value width. The feature map is applied by
the caller. Katharopoulos et al., "Transformers are RNNs", ICML 2020, equations 5 to 7.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .states import accumulator, apply_state, full_precision, mask_tokens, outer_sum

_CHUNK = 64  # causal: tokens that see each other through an explicit triangle


class LinearState(NamedTuple):
    """kv: `(B, H, D, E)` sum phi(k) v^T.  k: `(B, H, D)` sum phi(k)."""

    kv: Tensor
    k: Tensor


def linear_absorb(k: Tensor, v: Tensor, keep: Tensor | None = None) -> LinearState:
    """The state of mapped keys `k` `(B, N, H, D)` and values `v` `(B, N, H, E)`."""
    dtype = accumulator(v.dtype)
    with full_precision(v):
        k, v = mask_tokens(k, keep).to(dtype), mask_tokens(v, keep).to(dtype)
        return LinearState(outer_sum(k, v), k.sum(dim=1))


def linear_read(q: Tensor, state: LinearState, eps: float) -> Tensor:
    """Outputs `(B, N, H, E)` of mapped queries `q` `(B, N, H, D)`, in the accumulator's dtype."""
    with full_precision(q):
        q = q.to(state.kv.dtype)
        norm = torch.einsum("bnhd,bhd->bnh", q, state.k) + eps
        return apply_state(q, state.kv) / norm[..., None]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Every query reads every kept key. `q` `(B, M, H, D)`; `k` `(B, N, H, D)`; `v` `(B, N, H, E)`."""
    return linear_read(q, linear_absorb(k, v, keep), eps).to(v.dtype)


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Query i reads keys j <= i only. `q`, `k` `(B, N, H, D)`; `v` `(B, N, H, E)`; cost O(N).

    Chunks of 64 tokens: a triangle inside a chunk, the running state of the chunks before it.
    """
    dtype, n = accumulator(v.dtype), v.shape[1]
    pad = -n % _CHUNK

    def chunked(x: Tensor) -> Tensor:  # (B, N, H, D) -> (B, chunks, H, 64, D)
        return F.pad(x.to(dtype), (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, _CHUNK)).transpose(2, 3)

    with full_precision(v):
        qc, kc, vc = chunked(q), chunked(k), chunked(v)
        kv, ks = kc.transpose(-1, -2) @ vc, kc.sum(dim=-2)
        kv_before = F.pad(kv.cumsum(dim=1)[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        k_before = F.pad(ks.cumsum(dim=1)[:, :-1], (0, 0, 0, 0, 1, 0))
        scores = (qc @ kc.transpose(-1, -2)).tril()
        norm = scores.sum(dim=-1) + (qc @ k_before[..., None])[..., 0] + eps
        out = (scores @ vc + qc @ kv_before) / norm[..., None]
        return out.transpose(2, 3).flatten(1, 2)[:, :n].to(v.dtype)
