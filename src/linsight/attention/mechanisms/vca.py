"""Visual-contrast attention: two streams of pooled queries, one subtracted from the other, before and after reading.

"Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise Differentials", NeurIPS 2025
(arXiv 2511.00833). The official code was not to be had: this is the definition of the paper as two independent
re-implementations give it, and agrees with no published weights that we know of. P are n = p^2 tokens, the map of
queries pooled to p x p, T+ = P + e+, T- = P + e- with learned e, s = d^(-1/2). Per head,

    V^ = (1 - l0) RMSNorm(V+ - l1 V-),   V+ = softmax_keys(s T+ k^T) v, V- alike
    o  = (1 - l0) RMSNorm((A+ - l2 A-) V^) + conv3x3(v),   [A+, A-] = softmax(s q [T+; T-]^T)

where the softmax is over all 2n tokens together (`joint`, as the released classifier is reported to have it), or
over the n of each sign alone, as the paper writes it. l0 = 0.8 - 0.6 exp(-0.3 D) with D the place of the block, from
0, and l1, l2 = exp(a.b) - exp(c.d) + l0 of learned vectors. The norms are over the width of a head, in float32.

Prefix tokens are keys and queries as all others, but in no pooled token, and the convolution does not touch them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Tile, leaves, read_pooled

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..parts.pooled import Gather, Pool
from ..parts.token_conv import TokenConv, add_behind, convolved_values
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens, split_heads

_VECTORS = tuple(f"lambda_{stage}_{name}" for stage in (1, 2) for name in ("q1", "k1", "q2", "k2"))


class Contrast(Pool):
    """The pooled queries, once for each sign."""

    def finish(self, core: Any, state: Tensor, done: Done) -> Tensor:
        """T+ and T- `(B, 2n, H, D)`."""
        signs = (split_heads(table.to(state.dtype), core.num_heads) for table in (core.e_pos, core.e_neg))
        return torch.cat([state + sign for sign in signs], dim=1)


class Difference(Gather):
    """The values that both signs gather, one subtracted from the other."""

    def values(self, core: Any, mean: Tensor, done: Done) -> Tensor:
        """V^ `(B, H, n, E)`."""
        plus, minus = mean.chunk(2, dim=2)
        return core.normed(core.subln1, plus - core.weight(1, plus.dtype) * minus)


class HeadNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, whatever that of its weight."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """`scale` RMSNorm(x), `(..., E)`; the shape is kept."""
        weight = scale * self.weight.to(x.dtype)
        if leaves():  # not every exporter knows it
            return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + (self.eps or 0)) * weight
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


@register(
    "vca",
    formula="o = RMSNorm((A+ - l2 A-) RMSNorm(V+ - l1 V-)) + conv3x3(v), V+- = softmax(d^(-1/2) T+- k^T) v, "
    "A+- = softmax(d^(-1/2) q T+-^T), T+- = pool(q) + e+-",
    latex=r"\begin{aligned} o &= (1 - l_0) \mathrm{RMSNorm}((A_+ - l_2 A_-) \hat V) + \mathrm{conv}_{3 \times 3}(v) "
    r"\cr "
    r"[A_+, A_-] &= \mathrm{softmax}(s q [T_+; T_-]^\top) \cr "
    r"\hat V &= (1 - l_0) \mathrm{RMSNorm}(V_+ - l_1 V_-), \quad V_\pm = \mathrm{softmax}_{\mathrm{keys}}(s "
    r"T_\pm k^\top) v \cr "
    r"T_\pm &= \mathrm{pool}(q) + e_\pm, \quad s = d^{-1/2} \end{aligned}",
    family="low rank",
    complexity="O(N n d)",
    paper=Paper(
        "Linear Differential Vision Transformer: Learning Visual Contrasts via Pairwise Differentials",
        "2511.00833",
        "NeurIPS 2025",
    ),
)
class VisualContrast(Core):
    """Differential attention through pooled tokens of two signs.

    Args:
        contrast_tokens: n of each sign, a square number.
        joint: queries read by one softmax over both signs; False: by one for each.
        local: the depthwise convolution of v.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    structure = Structure(stream=True)
    halo = 1
    projections = "q_k_v"
    published = (
        *(Rename(f"to_{name}.", f"{name}.") for name in "qkv"),
        *(Rename(name, f"core.{name}") for name in ("e_pos", "e_neg", *_VECTORS)),
        *(Rename(f"{name}.", f"core.{name}.") for name in ("subln1", "subln2", "dwc")),
    )
    eps = 1e-5

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        contrast_tokens: int = 49,
        joint: bool = True,
        local: bool = True,
        index: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.side = math.isqrt(max(contrast_tokens, 0))
        if contrast_tokens < 1 or self.side**2 != contrast_tokens:
            raise LinsightError(f"contrast_tokens={contrast_tokens} of 'vca' must be a square number, as 16 or 49")
        self.num_heads = num_heads
        self.rounds = (Contrast((self.side, self.side)), Difference())
        self.joint = joint
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * (index or 0))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim // num_heads
        self.e_pos = nn.Parameter(torch.empty(1, contrast_tokens, dim, **factory))
        self.e_neg = nn.Parameter(torch.empty(1, contrast_tokens, dim, **factory))
        for table in (self.e_pos, self.e_neg):
            nn.init.normal_(table)
        for name in _VECTORS:
            self.register_parameter(name, nn.Parameter(torch.empty(width, **factory)))
            nn.init.normal_(getattr(self, name), std=0.1)
        self.subln1 = HeadNorm(width, eps=self.eps, **factory)
        self.subln2 = HeadNorm(width, eps=self.eps, **factory)
        self.dwc = TokenConv(dim, **factory) if local else None

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The values that queries read from V^, normed, and the convolution of v."""
        contrast, values = done
        q = tile.inner(tokens.q)
        # The difference of the maps goes to the values, so the maps need not be held.
        minus = -self.weight(2, values.dtype) * values
        if self.joint:
            out = read_pooled(q, contrast, torch.cat([values, minus], dim=2), None)
        else:
            positive, negative = contrast.chunk(2, dim=1)
            out = read_pooled(q, positive, values, None) + read_pooled(q, negative, minus, None)
        out = self.normed(self.subln2, out)
        if self.dwc is not None:
            out = add_behind(out, convolved_values(self.dwc, tokens, tile), tile.prefix)
        return out.to(tokens.q.dtype)

    def weight(self, stage: int, dtype: torch.dtype) -> Tensor:
        """l1 or l2, of the `stage`, 1 or 2."""
        q1, k1, q2, k2 = (getattr(self, f"lambda_{stage}_{name}").to(dtype) for name in ("q1", "k1", "q2", "k2"))
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lambda_init

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """(1 - l0) RMSNorm(x), in the dtype of x, which is the accumulator's."""
        return norm(x, 1 - self.lambda_init)
