"""Gates of heads: the shared ones are always there, of the routed ones each token keeps a few.

Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842), by its published code. The
first S of H heads are shared, of the other E = H - S each token keeps R. Of a token x, the input of the layer,

    p = softmax(W_g x),   g_e = R p_e / sum_kept p   where p_e is one of the R largest, else 0
    s = S softmax(W_1 x), of one shared head 1
    (a, b) = 2 softmax(W_0 x),   gates = [a s, b g];   without routed heads s, without shared heads g

With all weights 0 the gates of heads that are kept are 1. In training with routed heads the layer tells a loss, by
which they are used alike: E sum_e (mean_n p_e) (mean_n [e kept]), times 0.01.

All heads are computed and then multiplied by their gates, as in the published code, so those that are not kept save
neither time nor memory. Gates are computed in float32 (float64 for float64).
"""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import accumulator, count_tokens, full_precision, mask_tokens

from ..losses import add_loss
from .wide import WideLinear

BALANCE = "head balance"  # the kind of the loss
_WEIGHT = 0.01


class HeadGates(nn.Module):
    """The gates of `num_heads` heads.

    Args:
        shared: S, heads that every token has; None for a quarter of them. A single head is shared.
        routed: R, those that a token keeps of the others; None for half of these.
        owner: the mechanism, for errors.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared: int | None,
        routed: int | None,
        *,
        owner: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shared is None:
            shared = num_heads // 4 if num_heads > 1 else 1
        experts = num_heads - shared
        routed = (experts + 1) // 2 if routed is None else routed
        if not 0 <= shared <= num_heads:
            raise LinsightError(f"shared_heads={shared} of '{owner}' is from 0 to the {num_heads} heads")
        if not min(1, experts) <= routed <= experts:
            raise LinsightError(
                f"routed_heads={routed} of '{owner}' is how many of the other {experts} heads a token keeps: "
                f"{f'from 1 to {experts}' if experts else '0'}"
            )
        self.shared, self.experts, self.routed = shared, experts, routed
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.wg = WideLinear(dim, experts, **factory) if routed else None
        self.wg_0 = WideLinear(dim, 2, **factory) if routed and shared else None
        self.wg_1 = WideLinear(dim, shared, **factory) if shared > 1 else None

    def forward(self, out: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """The outputs `(B, N, H, E)` of heads times their gates, of the tokens `x` `(B, N, C)` that they belong to.

        keep: `(B, N)`, of which tokens the loss is.
        """
        gates = self.gates(x, keep)
        return (out.to(gates.dtype) * gates[..., None]).to(out.dtype)

    def gates(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """`(B, N, H)`, in the accumulator's dtype."""
        parts = []
        if self.shared:
            parts.append(self.shared * chances(self.wg_1, x) if self.wg_1 is not None else one_each(x))
        if self.wg is not None:
            parts.append(self.routes(chances(self.wg, x), keep))
        if self.wg_0 is not None:
            balance = 2 * chances(self.wg_0, x)
            parts = [part * balance[..., i : i + 1] for i, part in enumerate(parts)]
        return torch.cat(parts, dim=-1)

    def routes(self, p: Tensor, keep: Tensor | None) -> Tensor:
        """g, of p `(B, N, E)`."""
        kept = torch.zeros_like(p).scatter(-1, p.topk(self.routed, dim=-1).indices, 1.0)
        if self.training:
            share, used = (mask_tokens(part, keep).flatten(0, 1).sum(dim=0) for part in (p, kept))
            count = count_tokens(p, keep).sum().clamp(min=1)
            add_loss(BALANCE, self.experts * (share * used).sum() / count.square(), _WEIGHT)
        chosen = p * kept
        return self.routed * chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"shared={self.shared}, routed={self.routed} of {self.experts}"


def chances(linear: nn.Module, x: Tensor) -> Tensor:
    """softmax(W x) `(B, N, n)`, in the accumulator's dtype."""
    with full_precision(x):
        return linear(x.to(accumulator(x.dtype))).softmax(dim=-1)


def one_each(x: Tensor) -> Tensor:
    """Ones `(B, N, 1)` for tokens `x`, in the accumulator's dtype."""
    return torch.ones_like(x[..., :1], dtype=accumulator(x.dtype))
