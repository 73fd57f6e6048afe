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
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from linsight.ops import (
    SMALL,
    Convolved,
    Features,
    Grid,
    Layout,
    Moments,
    State,
    Tile,
    accumulator,
    add_products,
    affine_read,
    autocasts,
    central_absorb,
    dynamic_depthwise_conv,
    full_precision,
    mask_tokens,
)

from ..core import Capabilities, Core, Linear, Rename, Tokens, split_heads
from ..parts.token_conv import grid_values, on_grid
from ..registry import Paper, register


def _is_few(x: Tensor) -> bool:
    """Of one image `(1, N, C)`, so few tokens that products of C x C matrices cost what `InLine.folded` saves."""
    batch, n, width = x.shape
    return batch == 1 and n < 3 * width and n * width <= SMALL


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

    def folds(self, x: Tensor) -> bool:
        """On a CPU, of a feature map that is none, as long as it is quicker.

        In a compiled graph of four times as many tokens as channels at least, if that is known; eagerly of as many, or
        of one small image.
        """
        if not x.is_cpu or self.feature_map != "identity":
            return False
        _, n, width = x.shape
        if torch.compiler.is_compiling():
            return statically_known_true(n >= 4 * width)
        return n >= width or _is_few(x)

    def folded(self, x: Tensor, linears: list[Linear], layout: Layout, cond: Tensor) -> Tensor:
        """Without queries and keys, which only enter products; of one image of few tokens, `_of_few`.

        Of one head, with W_q, W_k, W_v, W_p its rows, or columns, of the layer's maps:

            proj(o) = (x - mean(x)) W_q^T M + mean(q) M + mean(v) W_p^T + b_p + conv(v) W_p^T,
            M = s W_k Cov(x, v) W_p^T

        so a layer costs four products of its tokens with C x C matrices, as its linear maps alone do.
        """
        batch, n, width = x.shape
        *linears, proj = linears
        if _is_few(x):
            return F.linear(self._of_few(x, linears, layout, cond), *proj)
        heads, prefix = self.num_heads, layout.prefix
        to_q, to_k, to_v = (linear for several in linears for linear in several.split(width))
        mean = x.mean(dim=1, keepdim=True)
        centred, mean_v = x - mean, F.linear(mean, *to_v)
        v = F.linear(centred, to_v.weight)
        cross = (v.transpose(1, 2) @ centred).view(batch, heads, -1, width)  # (B, H, E, C)
        k = to_k.weight.view(heads, -1, width)
        cov = k @ cross.mT  # (B, H, D, E), times n; scaled where it enters a sum
        scale = k.shape[1] ** -0.5 / n
        matrix = (cov @ proj.weight.view(-1, heads, cov.shape[-1]).permute(1, 2, 0)).flatten(1, 2)  # (B, H * D, C)
        shift = F.linear(mean_v, *proj).baddbmm_(F.linear(mean, *to_q), matrix, alpha=scale)
        out = torch.baddbmm(shift, centred, to_q.weight.mT @ matrix, alpha=scale)
        if self.generator is not None:
            condition = mean if cond is x else cond.mean(dim=1, keepdim=True, dtype=x.dtype)
            kernels = self._generate(self.generator, condition[:, 0])
            local = dynamic_depthwise_conv(v.add_(mean_v)[:, prefix:], layout.grid[:2], kernels)
            out[:, prefix:].baddbmm_(local, proj.weight.mT.expand(batch, -1, -1))
        return out

    def _of_few(self, x: Tensor, linears: list[Linear], layout: Layout, cond: Tensor) -> Tensor:
        """The formula, of one image, in the fewest calls, each of which takes longer than what it computes."""
        _, n, width = x.shape
        heads, prefix = self.num_heads, layout.prefix
        q, k, v = (part for linear in linears for part in F.linear(x, *linear).split(width, dim=-1))
        share = x.new_full((1, 1, n), 1 / n)  # a product with it is a mean
        mean_v = torch.bmm(share, v)
        parts = (q, k - torch.bmm(share, k), v - mean_v)
        q, k, centred = (part.view(n, heads, -1).transpose(0, 1) for part in parts)  # (H, N, D)
        out = torch.baddbmm(mean_v.view(heads, 1, -1), q, torch.bmm(k.mT, centred), alpha=k.shape[-1] ** -0.5 / n)
        out = out.transpose(0, 1).reshape(1, n, width)
        if self.generator is not None:
            condition = torch.bmm(share, x) if cond is x else cond.mean(dim=1, keepdim=True, dtype=x.dtype)
            kernels = self._generate(self.generator, condition[:, 0])
            add_products(out[:, prefix:], v[:, prefix:], layout.grid[:2], kernels)
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
        if autocasts(mean):
            with full_precision(mean):
                return self._generate(generator, mean)
        first, act, second = generator
        hidden = act(self._grouped(first, split_heads(mean, self.num_heads).transpose(0, 1)))
        return self._grouped(second, hidden).transpose(0, 1).reshape(*mean.shape, 3, 3)

    def _grouped(self, conv: Any, x: Tensor) -> Tensor:
        """The grouped 1x1 convolution of one token, head by head: `(H, B, D)` -> `(H, B, out)`."""
        weight, bias = conv.weight, conv.bias
        if weight.dtype != x.dtype:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        heads = self.num_heads
        return torch.baddbmm(bias.view(heads, 1, -1), x, weight.view(heads, -1, x.shape[-1]).mT)
