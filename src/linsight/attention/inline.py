"""InLine attention: linear attention made injective by subtracting the mean score.

Han et al., "Bridging the Divide: Reconsidering Softmax and Linear Attention", NeurIPS 2024
(arXiv 2412.06590). Per head, with s = d^(-1/2) and the means over the N tokens:

    o = mean(v) + s q Cov(k, v),   Cov(k, v) = (1/N) sum_j (k_j - mean(k))^T (v_j - mean(v))

which is the paper's weight phi(q).phi(k_j) - mean_s phi(q).phi(k_s) + 1/N, with the factor s/N of the
published code on the similarity. Weights sum to 1, may be negative, and nothing is divided.

To it comes a local term on the grid, a 3x3 depthwise convolution of v whose kernel is generated for
each image from the mean token (per head an MLP d -> d -> 9d). The mean includes prefix tokens; the
convolution does not touch them.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from linsight.ops import (
    Convolved,
    Features,
    Grid,
    Layout,
    Moments,
    State,
    Tile,
    accumulator,
    affine_read,
    apply_state,
    central_absorb,
    depthwise_conv,
    foldable,
    full_precision,
    mask_tokens,
    outer_sum,
    unrecorded,
)

from ._core import Capabilities, Core, Rename, Tokens, split_heads
from ._local import grid_values, on_grid
from ._registry import Paper, register

SMALL = 2**17  # numbers: of fewer, the steps of an image cost more than what they do


class InLineState(NamedTuple):
    """kv: the central moments of phi(k) and v.  x: `(B, C)` sum of the conditioning tokens."""

    kv: Moments
    x: Tensor


class InLineReader(NamedTuple):
    """v: `(B, H, E)` mean value.  cov: `(B, H, D, E)`, scaled.  kernels: `(B, C, 3, 3)`, or None."""

    v: Tensor
    cov: Tensor
    kernels: Tensor | None


@register(
    "inline",
    formula="o = mean(v) + d^(-1/2) q Cov(k, v) + conv3x3(v; kernel(mean(x)))",
    complexity="O(N d^2)",
    paper=Paper("Bridging the Divide: Reconsidering Softmax and Linear Attention", "2412.06590", "NeurIPS 2024"),
)
class InLine(Core):
    """Injective linear attention with a per-image dynamic convolution.

    Args:
        feature_map: phi, applied to q and k; "exp" is exp(0.2 x). Every published model uses identity.
        local: the dynamic convolution on v.
    """

    capabilities = Capabilities(keep=True, sizes=True, stream=True, prefix=True)
    halos = (0, 1)
    conditioned = True
    published = (Rename("residual.", "core.generator."),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature_map: Literal["identity", "relu", "leaky_relu", "exp"] = "identity",
        local: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.feature_map = feature_map
        factory = {"device": device, "dtype": dtype}
        self.generator = (
            nn.Sequential(
                nn.Conv1d(dim, dim, 1, groups=num_heads, **factory),  # type: ignore[arg-type]
                nn.GELU(),
                nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **factory),  # type: ignore[arg-type]
            )
            if local
            else None
        )

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """Outputs `(B, N, H, E)`. One small image on a CPU, of which steps are all the cost, goes by fewer."""
        x = tokens.x
        if (
            unrecorded()  # first, as a graph would be for the sizes that are asked for below
            and x is not None
            and x.shape[0] == 1
            and x.numel() <= SMALL
            and x.device.type == "cpu"
            and tokens.keep is layout.sizes is None
            and self.generator is not None
            and self.feature_map == "identity"
            and foldable(x, next(self.generator.parameters()))
        ):
            return self._of_one(tokens, x, layout.grid, self.generator)
        return super().forward(tokens, layout, context_layout=context_layout, score_bias=score_bias)

    def _of_one(self, tokens: Tokens, x: Tensor, grid: Grid, generator: nn.Sequential) -> Tensor:
        """The same: the mean value is the convolution's bias, and nothing is a state."""
        (_, n, heads, width), prefix = tokens.v.shape, grid.prefix
        mean_k, mean_v = tokens.k.mean(1, keepdim=True), tokens.v.mean(1, keepdim=True)
        cov = outer_sum(tokens.k - mean_k, tokens.v - mean_v).mul_(tokens.k.shape[-1] ** -0.5 / n)
        kernels = self._generate(generator, x.mean(1))[0, :, None]  # (C, 1, 3, 3)
        out = torch.empty_like(tokens.v, memory_format=torch.contiguous_format)
        read = apply_state(tokens.q, cov)
        local = depthwise_conv(tokens.v.flatten(2)[:, prefix:], grid[:2], kernels, mean_v.flatten())
        torch.add(read[:, prefix:], local.unflatten(-1, (heads, width)), out=out[:, prefix:])
        if prefix:
            torch.add(read[:, :prefix], mean_v, out=out[:, :prefix])
        return out

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> InLineState:
        """Central moments of phi(k) and v, and the sum of x."""
        x = tokens.v.flatten(2) if tokens.x is None else tokens.x
        total = mask_tokens(x, tokens.keep).sum(dim=1, dtype=accumulator(x.dtype))
        moments = central_absorb(Features(tokens.k, self.feature_map), tokens.v, tokens.keep)
        return InLineState(moments, total)

    def finish(self, r: int, state: InLineState, grid: Grid) -> InLineReader:
        """Means, covariance and the kernels that the mean token generates."""
        kernels = None
        if self.generator is not None:
            mean = state.x / state.kv.count.clamp_min(1)[:, None]
            kernels = self._generate(self.generator, mean)
        scale = state.kv.k.shape[-1] ** -0.5
        return InLineReader(state.kv.v, state.kv.covariance(scale), kernels)

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """mean(v) + s q Cov(k, v), and the local term on the grid."""
        state: InLineReader = done[0]
        q = Features(tile.inner(tokens.q), self.feature_map)
        local = None
        if state.kernels is not None:
            local = on_grid(
                Convolved(grid_values(tokens, tile), tile.seen, state.kernels, None, self.num_heads, True), tile
            )
        return affine_read(q, state.cov, state.v, add=local, dtype=tokens.q.dtype)

    def _generate(self, generator: nn.Sequential, mean: Tensor) -> Tensor:
        """`(B, C)` -> `(B, C, 3, 3)`, tap 3*ky + kx of channel c at 9c + tap; in the dtype of `mean`."""

        heads = self.num_heads

        def grouped(x: Tensor, conv: Any) -> Tensor:  # (H, B, d) -> (H, B, out)
            weight, bias = conv.weight, conv.bias
            if weight.dtype != x.dtype:
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return torch.baddbmm(bias.view(heads, 1, -1), x, weight.view(heads, -1, x.shape[-1]).transpose(1, 2))

        first, act, second = generator
        with full_precision(mean):
            hidden = act(grouped(split_heads(mean, heads).transpose(0, 1), first))
            return grouped(hidden, second).transpose(0, 1).reshape(*mean.shape, 3, 3)
