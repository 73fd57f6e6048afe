"""Hedgehog: kernel attention whose feature map is learned, and spiky as softmax is, by distillation from it.

Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", ICLR 2024
(arXiv 2402.04347), with the constants of its published code. With y = W x + b of a head's vector x, one map for
queries and one for keys,

    o_i = phi_q(q_i) S / (phi_q(q_i) . z + 1e-12),   S = sum_j phi_k(k_j) v_j^T,   z = sum_j phi_k(k_j)

    softmax        phi(x) = softmax([2y | -2y])             of all 2f entries at once, W is one for all heads
    softmax_parts  phi(x) = [softmax(y) | softmax(-y)]      each at least 1e-12
    exp_parts      phi(x) = [exp(y - max y) | exp(min y - y)], each at least 1e-12
    exp            phi(x) = [exp(y) | exp(-y)]              the map of the paper

In the middle two W is a matrix for each head. They weight a key by one over its own sum or maximum, so all four are
different functions: weights of one are not those of another. No scale d^(-1/2) is anywhere. W starts as the identity.
Options of lolcats that no published command takes are left out: a bias, one map for both, a skip connection, half
spaces.

In "exp" no number is ever above 1: sums over keys are kept relative to the largest exponent of each feature, and a
query's exponents are taken with those, relative to the largest of the result. This cancels, so the function is the
paper's, without a constant below the line, and features far below others do not vanish. It needs all keys, so this map
has no causal form here. Features are computed in float32 (float64 for float64).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from linsight.errors import CapabilityError, LinsightError
from linsight.ops import (
    Features,
    LinearState,
    LogSumExp,
    Tile,
    accumulator,
    apply_state,
    full_precision,
    unflatten,
)

from ..capabilities import Capabilities, Structure
from ..core import Rename
from ..parts.kernel import KernelCore, KernelSums
from ..parts.wide import WideLinear
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

FeatureMap = Literal["softmax", "softmax_parts", "exp_parts", "exp"]
_LEAST = 1e-12  # of features, in the published code of maps in two parts


class HeadMap(nn.Module):
    """The learned feature map of one kind of tokens, `(B, n, H, D)` to `(B, n, H, 2f)`, in the accumulator's dtype.

    Its weights are `layer` `(D, D)` with a bias, one for all heads, or `heads` `(H, D, f)` without.
    """

    def __init__(self, num_heads: int, width: int, features: int, kind: FeatureMap, **factory: Any) -> None:
        super().__init__()
        self.kind = kind
        self.layer: WideLinear | None = None
        if kind == "softmax":
            self.layer = WideLinear(width, features, **factory)
            self.init_weights()
        else:
            one = torch.eye(width, features, **factory)
            self.heads = nn.Parameter(one.expand(num_heads, -1, -1).clone())

    def init_weights(self) -> None:
        """The published start: y is x."""
        if self.layer is not None:
            nn.init.eye_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

    def exponents(self, x: Tensor) -> Tensor:
        """[y | -y]."""
        dtype = accumulator(x.dtype)
        x = x.to(dtype)
        with full_precision(x):
            y = self.layer(x) if self.layer is not None else apply_state(x, self.heads.to(dtype)[None])
            return torch.cat([y, -y], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """The features phi(x); of the map "exp" their exponents."""
        y = self.exponents(x)
        if self.kind == "exp":
            return y
        if self.kind == "softmax":
            return (2 * y).softmax(dim=-1)
        parts = unflatten(y, -1, (2, -1))
        if self.kind == "softmax_parts":
            return parts.softmax(dim=-1).clamp(min=_LEAST).flatten(-2)
        top = parts.amax(dim=-1, keepdim=True)
        return (parts - top).exp().clamp(min=_LEAST).flatten(-2)


class Exponentials(Round):
    """S and z of the map "exp"."""

    def absorb(self, core: "Hedgehog", tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """A log-sum-exp for each feature."""
        return LogSumExp.absorb(core.map_k(tokens.k), tokens.v, tokens.keep)

    def finish(self, core: "Hedgehog", state: LogSumExp, done: Done) -> tuple[Tensor, LinearState]:
        """The largest exponents `(B, 1, H, 2f)`, and the sums relative to those; an empty z is 1: 0 is read."""
        empty = state.total == 0
        sums = LinearState(state.value, state.total.masked_fill(empty, 1))
        return state.top.masked_fill(empty, 0)[:, None], sums


@register(
    "hedgehog",
    formula="o_i = phi_q(q_i) sum_j phi_k(k_j) v_j^T / (phi_q(q_i) . sum_j phi_k(k_j) + eps), "
    "phi(x) = softmax([2y | -2y]), y = W x + b",
    latex=r"o_i = \frac{\phi_q(q_i) \sum_j \phi_k(k_j) v_j^\top}{\phi_q(q_i) \cdot \sum_j \phi_k(k_j) + \varepsilon}, "
    r"\quad \phi(x) = \mathrm{softmax}([2y, -2y]), \quad y = W x + b",
    family="feature map",
    complexity="O(N d f)",
    paper=Paper(
        "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", "2402.04347", "ICLR 2024"
    ),
)
class Hedgehog(KernelCore):
    """Kernel attention with a learned feature map that takes the place of softmax.

    Args:
        feature_map: phi, see above; "softmax" is that of flash-linear-attention, those in parts are lolcats'.
        features: f, half the number of features; 0 is the width of a head, which "softmax" always has.
        causal: token i sees tokens j <= i only; then there are no tiles.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True, causal=True)
    turns = "features"
    published = (
        *(Rename(f"feature_map_{name}.layer.", f"core.map_{name}.layer.") for name in "qk"),
        *(Rename(f"feature_map_{name}.mlp.layer", f"core.map_{name}.heads") for name in "qk"),
    )
    eps = 1e-12

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature_map: FeatureMap = "softmax",
        features: int = 0,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = dim // num_heads
        if features < 0 or (feature_map == "softmax" and features not in (0, width)):
            raise LinsightError(
                f"features={features} of 'hedgehog' must be above 0, or 0 for the width of a head ({width}), which is "
                f"the only one of feature_map='softmax'"
            )
        self.num_heads = num_heads
        self.feature_map = feature_map
        if feature_map == "exp":
            if causal:
                raise CapabilityError(
                    "feature_map='exp' of 'hedgehog' is relative to all keys: it has no causal form, the others have"
                )
            self.rounds = (Exponentials(),)
            self.eps = 0.0
            self.unturned = "feature_map='exp' keeps each feature relative to its own largest one: take another map"
        else:
            self.rounds = (KernelSums(),)
        self.causal = causal
        shape = (num_heads, width, features or width, feature_map)
        self.map_q, self.map_k = (HeadMap(*shape, device=device, dtype=dtype) for _ in "qk")

    def init_weights(self) -> None:
        """The published start of both maps."""
        for mapping in (self.map_q, self.map_k):
            mapping.init_weights()

    def features(self, name: Literal["q", "k"], x: Tensor, tile: Tile, done: Done) -> Features:
        """phi; of queries and the map "exp", with the exponents of the keys."""
        mapping = self.map_q if name == "q" else self.map_k
        if self.feature_map != "exp":
            return Features(mapping(x))
        scores = mapping(x) + done[0]
        return Features(torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True)))

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """phi(q) against the sums; of the map "exp" these come behind their exponents."""
        return super().read(tokens, tile, done[0] if self.feature_map == "exp" else done)
