"""Test-time training: heads whose inner model takes one step on (k, v), then answers q.

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
    InnerGradient,
    InnerLoss,
    Tile,
    accumulator,
    count_tokens,
    full_precision,
    inner_forward,
    inner_gradient,
    inner_step,
    mask_tokens,
)

from ..core import Core
from ..rounds import Done, Round
from ..tokens import Tokens, merge_heads, split_heads


class KeyMoments(NamedTuple):
    """Moments of each key channel. tokens: `(B, 1)`.  mean: `(B, C)`.  squares: `(B, C)`, of the distances to the mean.

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


class KeyMomentsRound(Round):
    """Moments of each key channel, for the norm that takes the mean away and divides by sqrt(variance + eps)."""

    def absorb(self, core: "InnerTraining", tokens: Tokens, tile: Tile, done: Done) -> KeyMoments:
        """Moments of the tile's keys."""
        k = mask_tokens(core.prepare("k", merge_heads(tokens.k), tile), tokens.keep)
        return KeyMoments.absorb(k, tokens.keep)

    def finish(self, core: "InnerTraining", state: KeyMoments, done: Done) -> KeyNorm:
        """The key norm."""
        variance = state.squares / state.tokens.clamp(min=1)
        return KeyNorm(state.mean[:, None], torch.rsqrt(variance + core.key_norm_eps)[:, None])


class InnerStep(Round):
    """The gradients of the inner models, and the step."""

    def absorb(self, core: "InnerTraining", tokens: Tokens, tile: Tile, done: Done) -> Any:
        """The sum of the gradients over the tile's tokens."""
        keep = tokens.keep
        k = mask_tokens(core.prepare("k", merge_heads(tokens.k), tile), keep)
        if done:
            k = mask_tokens((k - done[0].mean) * done[0].scale, keep)
        k = split_heads(tile.inner(core.localise("k", k, tile)), core.num_heads)
        v, keep = tile.inner(tokens.v), None if keep is None else tile.inner(keep)
        total = inner_gradient(core.model, core.loss, k, v, core.matrices(k.dtype), keep)
        return InnerGradient(total, count_tokens(v, keep))

    def finish(self, core: "InnerTraining", state: Any, done: Done) -> Any:
        """The trained matrices."""
        return core.trained(core.matrices(state.total.dtype), state, -2)


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
        step: InnerStep,
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
        self.rounds = (KeyMomentsRound(), step) if key_norm else (step,)
        self.inner_scale = width**-0.5 if scale is None else scale
        for i in range(self.model.matrices):
            matrix = nn.Parameter(torch.empty(1, num_heads, width, width, **factory))
            nn.init.trunc_normal_(matrix, std=0.02)
            self.register_parameter(f"w{i + 1}", matrix)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
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
        return torch.cat([getattr(self, f"w{i + 1}") for i in range(self.model.matrices)], dim=-1).to(dtype)

    def prepare(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """Queries or keys (`name` is "q" or "k") `(B, n, C)`, halo included, before the key norm."""
        return x.to(accumulator(x.dtype))

    def localise(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """Queries or keys behind the key norm, as the inner model sees them; the shape is kept."""
        return x
