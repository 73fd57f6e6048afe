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
from linsight.ops import (
    Grid,
    Layout,
    State,
    Tile,
    gather_pooled,
    gather_state,
    pool_tokens,
    read_pooled,
)

from ..core import Capabilities, Core, Rename, Tokens, split_heads
from ..parts.token_conv import add_local, grid_values
from ..registry import Paper, register

_VECTORS = tuple(f"lambda_{stage}_{name}" for stage in (1, 2) for name in ("q1", "k1", "q2", "k2"))


@register(
    "vca",
    formula="o = RMSNorm((A+ - l2 A-) RMSNorm(V+ - l1 V-)) + conv3x3(v), V+- = softmax(d^(-1/2) T+- k^T) v, "
    "A+- = softmax(d^(-1/2) q T+-^T), T+- = pool(q) + e+-",
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

    capabilities = Capabilities(sizes=True, stream=True, prefix=True)
    rounds = 2
    halos = (0, 0, 1)
    of_queries = (0,)
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
            nn.init.normal_(self.get_parameter(name), std=0.1)
        self.subln1 = nn.RMSNorm(width, eps=self.eps, **factory)
        self.subln2 = nn.RMSNorm(width, eps=self.eps, **factory)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory) if local else None

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> State:
        """The tile's share of the pooled queries `(B, n, H, D)`; then what both signs gather from its keys."""
        if r == 0:
            return pool_tokens(tokens.q, tile, (self.side, self.side))
        return gather_state(done[0], tokens.k, tokens.v, None, tokens.keep)

    def finish(self, r: int, state: State, grid: Grid) -> Tensor:
        """T+ and T- `(B, 2n, H, D)`, then V^ `(B, H, n, E)`."""
        return self._contrast(state) if r == 0 else self._difference(state.mean())

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """What queries read from V^, normed, and the convolution of v."""
        contrast, values = done
        q = tile.inner(tokens.q)
        # The difference of the maps goes to the values, so the maps need not be held.
        minus = -self._lambda(2, values.dtype) * values
        if self.joint:
            out = read_pooled(q, contrast, torch.cat([values, minus], dim=2), None)
        else:
            positive, negative = contrast.chunk(2, dim=1)
            out = read_pooled(q, positive, values, None) + read_pooled(q, negative, minus, None)
        out = self._norm(self.subln2, out)
        if self.dwc is not None:
            out = add_local(out, grid_values(tokens, tile), self.dwc, tile)
        return out.to(tokens.q.dtype)

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """The rounds over the whole; what is gathered, by scaled dot-product attention."""
        tile = Tile.whole(layout.grid, layout.sizes)
        contrast = self._contrast(pool_tokens(tokens.q, tile, (self.side, self.side)))
        values = self._difference(gather_pooled(contrast, tokens.k, tokens.v, None, tokens.keep))
        return self.read(tokens, tile, (contrast, values))

    def _contrast(self, pooled: Tensor) -> Tensor:
        signs = (split_heads(table.to(pooled.dtype), self.num_heads) for table in (self.e_pos, self.e_neg))
        return torch.cat([pooled + sign for sign in signs], dim=1)

    def _difference(self, gathered: Tensor) -> Tensor:
        plus, minus = gathered.chunk(2, dim=2)
        return self._norm(self.subln1, plus - self._lambda(1, plus.dtype) * minus)

    def _lambda(self, stage: int, dtype: torch.dtype) -> Tensor:
        q1, k1, q2, k2 = (self.get_parameter(f"lambda_{stage}_{name}").to(dtype) for name in ("q1", "k1", "q2", "k2"))
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lambda_init

    def _norm(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """(1 - l0) RMSNorm(x), in the dtype of x, which is the accumulator's."""
        return (1 - self.lambda_init) * F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)
