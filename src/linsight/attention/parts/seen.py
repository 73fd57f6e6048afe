"""The keys that each query sees, for mechanisms with scores whose formula counts them."""

import torch
from torch import Tensor


def seen_keys(
    q: Tensor, k: Tensor, keep: Tensor | None, *, causal: bool = False, bias: Tensor | None = None
) -> Tensor | None:
    """A mask that broadcasts to `(B, H, M, N)`, False where a query does not see a key; None where all see all.

    q, k: `(B, M, H, D)`, `(B, N, H, D)`.
    keep: `(B, N)`.
    causal: query i sees keys j <= i only.
    bias: on the scores, broadcasts to `(B, H, M, N)`: False, or minus infinity, is unseen.
    """
    seen = None if keep is None else keep[:, None, None]
    if causal:
        past = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        seen = past if seen is None else seen & past
    if bias is not None:
        allowed = bias if bias.dtype == torch.bool else bias > float("-inf")
        seen = allowed if seen is None else seen & allowed
    return seen


def count_seen(k: Tensor, seen: Tensor | None) -> Tensor:
    """How many of the keys `k` `(B, N, H, D)` a query sees, at least 1: broadcasts to `(B, H, M, 1)`, in its dtype."""
    if seen is None:
        return k.new_ones(k.shape[1]).sum().clamp(min=1)  # a sum, as the number may be symbolic
    return seen.expand(*seen.shape[:-1], k.shape[1]).sum(dim=-1, keepdim=True).clamp(min=1).to(k.dtype)
