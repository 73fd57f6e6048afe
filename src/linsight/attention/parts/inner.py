"""What test-time-training mechanisms share: heads whose inner model takes one step on (k, v), then answers q.

    L = (s/N) sum_n loss(f_W(k_n), v_n),   W' = W - lr clip(dL/dW),   o_n = f_W'(q_n)

with one W a head, shared by the batch, and one full-batch step an image. The models f and their gradients are in
`ops/inner.py`. Everything is computed in float32 (float64 for float64); s/N is applied to the finished sums, where
published code rounds (s/N) v to half precision. All tokens train, prefix tokens too; N counts those that do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linsight.ops import (
    INNER_MODELS,
    Grid,
    InnerGradient,
    InnerLoss,
    State,
    Tile,
    accumulator,
    count_tokens,
    full_precision,
    inner_forward,
    inner_gradient,
    inner_step,
    mask_tokens,
    merge,
)

from ..core import Core, Tokens, merge_heads, split_heads


class KeyMoments(NamedTuple):
    """Of each key channel. tokens: `(B, 1)`.  mean: `(B, C)`.  squares: `(B, C)`, of the distances to the mean.

    `Moments` without the products of two channels, which would cost as much again as the inner step.
    """

    tokens: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def absorb(cls, k: Tensor, keep: Tensor | None) -> "KeyMoments":
        """`k` `(B, N, C)`, in the accumulator's dtype, zero where not kept."""
        tokens = count_tokens(k, keep)[:, None]
        share = 1 / tokens.clamp(min=1)
        mean = k.sum(dim=1) * share
        centred = mask_tokens(k - mean[:, None], keep)
        return cls(tokens, mean + centred.sum(dim=1) * share, centred.square().sum(dim=1))

    def merge(self, other: "KeyMoments") -> "KeyMoments":
        """The moments of both sets of tokens (Chan, Golub, LeVeque 1979)."""
        tokens, apart = self.tokens + other.tokens, other.mean - self.mean
        share = other.tokens / tokens.clamp(min=1)
        squares = self.squares + other.squares + self.tokens * share * apart.square()
        return KeyMoments(tokens, self.mean + apart * share, squares)


class KeyNorm(NamedTuple):
    """mean, scale: `(B, 1, C)`."""

    mean: Tensor
    scale: Tensor


class InnerTraining(Core):
    """Heads that train an inner model. Mechanisms add what they do to q and k before and after the key norm."""

    key_norm_eps = 1.0  # with small keys it shrinks rather than normalises

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        inner_model: str,
        loss: InnerLoss,
        key_norm: bool,
        inner_lr: float,
        scale: float | None,
        clip: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        width = dim // num_heads
        self.num_heads = num_heads
        self.model = INNER_MODELS[inner_model]
        self.loss: InnerLoss = loss
        self.inner_lr, self.clip = inner_lr, clip
        self.inner_scale = width**-0.5 if scale is None else scale
        self.rounds = 2 if key_norm else 1
        for i in range(self.model.matrices):
            matrix = nn.Parameter(torch.empty(1, num_heads, width, width, **factory))
            nn.init.trunc_normal_(matrix, std=0.02)
            self.register_parameter(f"w{i + 1}", matrix)

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Any:
        """Moments of each key channel, where keys are normed; then the sum of inner gradients."""
        keep = tokens.keep
        k = mask_tokens(self.prepare("k", merge_heads(tokens.k), tile), keep)
        if r < self.rounds - 1:
            return KeyMoments.absorb(k, keep)
        if done:
            k = mask_tokens((k - done[0].mean) * done[0].scale, keep)
        k = split_heads(tile.inner(self.localise("k", k, tile)), self.num_heads)
        v, keep = tile.inner(tokens.v), None if keep is None else tile.inner(keep)
        total = inner_gradient(self.model, self.loss, k, v, self.matrices(k.dtype), keep)
        return InnerGradient(total, count_tokens(v, keep))

    def merge(self, r: int, a: Any, b: Any) -> State:
        """The state of two disjoint sets of tokens."""
        return a.merge(b) if isinstance(a, KeyMoments) else merge(a, b)

    def finish(self, r: int, state: Any, grid: Grid) -> Any:
        """The key norm; the trained matrices."""
        if r < self.rounds - 1:
            variance = state.squares / state.tokens.clamp(min=1)
            return KeyNorm(state.mean[:, None], torch.rsqrt(variance + self.key_norm_eps)[:, None])
        return self.trained(self.matrices(state.total.dtype), state, -2)

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """The trained model on the queries."""
        return self.answer(tokens, tile, done[-1]).to(tokens.q.dtype)

    def answer(self, tokens: Tokens, tile: Tile, w: Tensor) -> Tensor:
        """`read`, in the dtype of the trained matrices `w`."""
        q = mask_tokens(self.prepare("q", merge_heads(tokens.q), tile), tokens.keep)
        q = tile.inner(self.localise("q", q, tile))
        return inner_forward(self.model, split_heads(q, self.num_heads), w)

    def trained(self, w: Tensor, gradient: InnerGradient, *axes: int) -> Tensor:
        """`w` after the step; the clip's norm is over `axes`."""
        with full_precision(w):
            clip = axes if self.clip else ()
            return inner_step(w, gradient, scale=self.inner_scale, rate=self.inner_lr, clip=clip)

    def matrices(self, dtype: torch.dtype) -> Tensor:
        """The inner matrices side by side, `(1, H, D, M * D)`."""
        return torch.cat([self.get_parameter(f"w{i + 1}") for i in range(self.model.matrices)], dim=-1).to(dtype)

    def prepare(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """Queries or keys (`name` is "q" or "k") `(B, n, C)`, halo included, before the key norm."""
        return x.to(accumulator(x.dtype))

    def localise(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """The same behind it."""
        return x
