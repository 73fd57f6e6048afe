"""TaylorShift: attention by the second-order Taylor polynomial of exp, pair by pair or through features of degree 2.

Nauen et al., "TaylorShift: Shifting the Complexity of Self-Attention from Squared to Linear (and Back) using
Taylor-Softmax", ICPR 2024 (arXiv 2403.02920). Per head, with a learnable temperature t,

    o_i = sum_j f(s_ij) v_j / sum_j f(s_ij),   f(s) = s^2 / 2 + s + 1,   s_ij = t q_i / |q_i| . k_j / |k_j|

Without `normalize_input`, s_ij = C^(-1/2) q_i . k_j, C the width of all heads. `output_normalized` multiplies the
result by (N / d)^(1/2), N the number of keys, as the published vision models do. f is 1/2 or more, so there is no eps.

"direct" makes all N^2 pairs; "efficient" has f(x . y) = phi(x) . phi(y), phi(x) = [2^(-1/2) x_a^2, x_a x_b for a < b,
x_a, 1], that is (d + 1)(d + 2) / 2 features, half as many as published, which has x_a x_b and x_b x_a. Both are one
function, but for rounding; "auto" is direct up to as many keys as there are features, and efficient beyond them, in
graphs of any size and over tiles. Features of degree 2 are made for some thousand tokens at a time: those of all would
be d / 2 times the tokens. Everything is computed in float32 (float64 for float64), and nothing in place: the published
direct form cannot be trained with `output_normalized`. Dropout of weights, which differs there from form to form, is
left out, and so are other polynomials than that of exp.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import (
    Features,
    Layout,
    LinearState,
    Tile,
    accumulator,
    count_tokens,
    full_precision,
    mask_tokens,
    merge,
    square_features,
    traced,
)

from ..capabilities import Capabilities, Structure
from ..core import Rename
from ..parts.kernel import CountedSums, KernelCore, KernelMeans
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens

AT_ONCE = 2**22  # numbers of degree 2 that are made at a time


class TaylorMeans(KernelMeans):
    """The means of phi(k) v^T and phi(k)."""

    def absorb(self, core: "TaylorShift", tokens: Tokens, tile: Tile, done: Done) -> CountedSums:  # type: ignore
        """The sums over the tile's tokens, some at a time, and their number."""
        state: CountedSums | None = None
        for some in core.stretches(tokens.k):
            k, v = tokens.k[:, some], tokens.v[:, some]
            keep = None if tokens.keep is None else tokens.keep[:, some]
            part = super().absorb(core, Tokens(k, k, v, keep=keep), tile, done)
            state = part if state is None else merge(state, part)
        assert state is not None
        return state

    def finish(self, core: "TaylorShift", state: CountedSums, done: Done) -> LinearState:  # type: ignore[override]
        """Divided by the number of tokens, values with the factor of the output; of no keys, 0 is read."""
        means = super().finish(core, state, done)
        kv = means.kv * core.factor(state.count)[:, None, None, None]
        return LinearState(kv, means.k.masked_fill((state.count == 0)[:, None, None], 1))


@register(
    "taylorshift",
    formula="o_i = sum_j f(s_ij) v_j / sum_j f(s_ij), f(s) = s^2/2 + s + 1, s_ij = t q_i/|q_i| . k_j/|k_j|",
    latex=r"o_i = \frac{\sum_j f(s_{ij}) v_j}{\sum_j f(s_{ij})}, \quad f(s) = \frac{s^2}{2} + s + 1, \quad s_{ij} = t "
    r"\frac{q_i}{\lVert q_i \rVert} \cdot \frac{k_j}{\lVert k_j \rVert}",
    family="feature map",
    complexity="O(N d^3)",
    paper=Paper(
        "TaylorShift: Shifting the Complexity of Self-Attention from Squared to Linear (and Back) using Taylor-Softmax",
        "2403.02920",
        "ICPR 2024",
    ),
)
class TaylorShift(KernelCore):
    """Softmax attention with the second-order Taylor polynomial in the place of exp.

    Args:
        form: "direct" makes every pair, "efficient" sums features of degree 2; "auto" goes by the number of keys.
        normalize_input: queries and keys have length 1, and a head a temperature; else scores are scaled by C^(-1/2).
        output_normalized: outputs are multiplied by (N / d)^(1/2), as in the published vision models.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    turns = "tokens"
    rounds = (TaylorMeans(),)
    published = (Rename("temperature", "core.temperature"),)
    eps = 0.0

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: Literal["auto", "direct", "efficient"] = "auto",
        normalize_input: bool = True,
        output_normalized: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.form, self.output_normalized = form, output_normalized
        self.width, self.scale = dim // num_heads, dim**-0.5
        self.count = (self.width + 1) * (self.width + 2) // 2  # of features, all pairs once: the paper's change-over
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.temperature = nn.Parameter(torch.ones(1, num_heads, 1, 1, **factory)) if normalize_input else None

    def factor(self, count: Tensor) -> Tensor:
        """The factor of the output, by the number of keys."""
        return (count / self.width).sqrt() if self.output_normalized else torch.ones_like(count)

    def scaled(self, name: str, x: Tensor) -> Tensor:
        """Queries or keys `(B, n, H, D)` whose products are s, in the accumulator's dtype."""
        x = x.to(accumulator(x.dtype))
        if self.temperature is None:
            return x * self.scale if name == "q" else x
        x = F.normalize(x, dim=-1)
        return x * self.temperature.to(x.dtype).transpose(1, 2) if name == "q" else x

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """phi."""
        x = self.scaled(name, x)
        return Features(torch.cat([square_features(x), x, torch.ones_like(x[..., :1])], dim=-1))

    def stretches(self, x: Tensor) -> list[slice]:
        """All tokens of `x` `(B, n, H, D)`, in parts whose features are made at once."""
        if traced(x):
            return [slice(None)]
        step = max(1, AT_ONCE // max(1, x.shape[0] * x.shape[2] * self.count))
        return [slice(first, first + step) for first in range(0, max(1, x.shape[1]), step)]

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """phi(q) against both means."""
        outs = []
        for some in self.stretches(tokens.q):
            outs.append(super().read(tokens._replace(q=tokens.q[:, some]), tile, done))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """By pairs where that is asked for, or where it is shorter and all tokens are at hand."""
        short = self.form == "auto" and not traced(tokens.k) and tokens.k.shape[1] <= self.count
        if self.form == "direct" or short:
            return self.direct(tokens)
        return super().forward(tokens, layout, context_layout=context_layout)

    def direct(self, tokens: Tokens) -> Tensor:
        """Every pair."""
        q, k = self.scaled("q", tokens.q), self.scaled("k", mask_tokens(tokens.k, tokens.keep))
        v = mask_tokens(tokens.v, tokens.keep).to(q.dtype)
        with full_precision(q):
            scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
            weights = scores.square() / 2 + scores + 1
            if tokens.keep is not None:
                weights = weights * tokens.keep[:, None, None].to(q.dtype)
            total = weights.sum(dim=-1, keepdim=True)
            out = ((weights / total.masked_fill(total == 0, 1)) @ v.transpose(1, 2)).transpose(1, 2)
        return (out * self.factor(count_tokens(k, tokens.keep))[:, None, None, None]).to(tokens.v.dtype)
