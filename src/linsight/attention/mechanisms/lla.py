"""Local linear attention: at each query a linear regression of v on k, weighted by softmax, and its value there.

"Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention for Test-Time Regression", ICLR 2026
(arXiv 2510.01450). Published with w_ij = exp(d^(-1/2) q_i . k_j) and sums over the keys that a query sees,

    omega = sum_j w_ij,   mu = sum_j w_ij (k_j - q_i),   Sigma = sum_j w_ij (k_j - q_i)(k_j - q_i)^T + lambda omega
    rho = Sigma^(-1) mu,   o_i = sum_j w_ij (1 - rho . (k_j - q_i)) v_j / (omega - mu . rho)

Here by the Sherman-Morrison formula, with p = w / omega and the mean m and the covariances of the keys under p:

    o_i = mean v + Cov(v, k) (Cov(k, k) + lambda)^(-1) (q_i - m)

which is the same number, and has no difference below the line that may be near 0. Keys are brought near zero before
their squares are summed. A large lambda gives softmax attention. Everything is computed in float32 (float64 for
float64), with one d x d system for each query, solved directly: O(N^2 d^2 + N d^3), and N d^2 numbers in memory.

lambda is one number for all tokens, all of the covariance is kept, and the scale is fixed: options of the published
code by which lambda is made from a token, or blocks of the covariance are kept, are left out.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Layout, accumulator, count_tokens, full_precision, mask_tokens, unflatten

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core
from ..parts.seen import seen_keys
from ..registry import Paper, register
from ..tokens import Tokens


@register(
    "lla",
    formula="o_i = mean_i(v) + Cov_i(v, k) (Cov_i(k, k) + lambda)^(-1) (q_i - mean_i(k)), "
    "under p_ij = softmax_j(d^(-1/2) q_i . k_j)",
    latex=r"o_i = \bar v_i + \mathrm{Cov}_i(v, k) (\mathrm{Cov}_i(k, k) + \lambda)^{-1} (q_i - \bar k_i), \quad "
    r"\text{weighted by } p_{ij} = \mathrm{softmax}_j(d^{-1/2} q_i \cdot k_j)",
    family="scores",
    complexity="O(N^2 d^2 + N d^3)",
    paper=Paper("Local Linear Attention", "2510.01450", "ICLR 2026"),
)
class LLA(Core):
    """Ridge regression of the values on the keys around each query.

    Args:
        ridge: lambda, above 0.
        causal: token i sees tokens j <= i only.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(reduced=True, causal=True, cost=Cost.QUADRATIC)
    turns = "tokens"
    unmet: ClassVar[Mapping[str, str]] = {"onnx": "ONNX has no operator that solves linear equations"}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ridge: float = 0.01,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not ridge > 0:
            raise LinsightError(f"ridge={ridge} of 'lla' must be above 0: with few keys there is no solution without")
        self.num_heads, self.ridge, self.causal = num_heads, float(ridge), causal

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """The regression's value at each query."""
        dtype = accumulator(tokens.v.dtype)
        keep = tokens.keep
        k, v = (mask_tokens(x, keep).to(dtype) for x in (tokens.k, tokens.v))
        with full_precision(k):
            # Of no effect on the result, so not for autograd; without it covariances lose digits.
            centre = k.detach().sum(dim=1) / count_tokens(k, keep).clamp(min=1)[:, None, None]
            q, k, v = (x.transpose(1, 2) for x in (tokens.q.to(dtype), mask_tokens(k - centre[:, None], keep), v))
            p = self.weights(q, k, keep)
            pairs = torch.cat([k[..., None] * k[..., None, :], k[..., None] * v[..., None, :]], dim=-1)
            width = k.shape[-1]
            mean_k, mean_v = p @ k, p @ v
            means = torch.cat([mean_k, mean_v], dim=-1)
            moments = unflatten(p @ pairs.flatten(-2), -1, (width, -1))  # (B, H, M, D, D + E)
            moments = moments - mean_k[..., None] * means[..., None, :]
            ridge = self.ridge * torch.eye(width, dtype=dtype, device=k.device)
            away = q - centre[:, :, None] - mean_k
            slope = torch.linalg.solve(moments[..., :width] + ridge, away[..., None])
            out = mean_v + (slope * moments[..., width:]).sum(dim=-2)
            return out.transpose(1, 2).to(tokens.v.dtype)

    def weights(self, q: Tensor, k: Tensor, keep: Tensor | None) -> Tensor:
        """p `(B, H, M, N)`; where a query sees nothing, equal ones of keys and values that are 0."""
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        seen = seen_keys(q.transpose(1, 2), k.transpose(1, 2), keep, causal=self.causal)
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, ridge={self.ridge:g}"
