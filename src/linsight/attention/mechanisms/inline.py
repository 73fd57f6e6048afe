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

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from linsight.ops import (
    Convolved,
    Features,
    Moments,
    Tile,
    accumulator,
    affine_read,
    central_absorb,
    copied,
    full_precision,
    mask_tokens,
)

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..parts.token_conv import grid_values
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens, split_heads


class InLineState(NamedTuple):
    """kv: the central moments of phi(k) and v.  x: `(B, C)` sum of the tokens that kernels are generated from."""

    kv: Moments
    x: Tensor


class InLineReader(NamedTuple):
    """v: `(B, H, E)` mean value.  cov: `(B, H, D, E)`, scaled.  kernels: `(B, C, 3, 3)`, or None."""

    v: Tensor
    cov: Tensor
    kernels: Tensor | None


class Covariance(Round):
    """Central moments of keys and values, and the mean token, which generates the kernels."""

    def absorb(self, core: "InLine", tokens: Tokens, tile: Tile, done: Done) -> InLineState:
        """Moments and sum of the tile's tokens."""
        x = next(t for t in (tokens.residual, tokens.x, tokens.v.flatten(2)) if t is not None)
        total = mask_tokens(x, tokens.keep).sum(dim=1, dtype=accumulator(x.dtype))
        k = Features(tokens.k, core.feature_map, turn=core.turn_of(tokens.k, tile))
        return InLineState(central_absorb(k, tokens.v, tokens.keep), total)

    def finish(self, core: "InLine", state: InLineState, done: Done) -> InLineReader:
        """Means, covariance and kernels."""
        kernels = None
        if core.generator is not None:
            mean = state.x / state.kv.count.clamp_min(1)[:, None]
            kernels = core.generator(mean).view(*mean.shape, 3, 3)  # tap 3*ky + kx of channel c at 9c + tap
        return InLineReader(state.kv.v, state.kv.covariance(state.kv.k.shape[-1] ** -0.5), kernels)


class HeadLinear(nn.Conv1d):
    """A linear map within each head, published as a grouped 1x1 convolution."""

    def __init__(self, dim: int, out: int, num_heads: int, **factory: Any) -> None:
        super().__init__(dim, out, 1, groups=num_heads, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C)` to `(B, out)`, in the dtype of x, whatever autocast says."""
        assert self.bias is not None
        weight = self.weight.to(x.dtype).view(self.groups, self.out_channels // self.groups, -1)
        bias = self.bias.to(x.dtype).view(self.groups, 1, -1)
        with full_precision(x):
            out = torch.baddbmm(
                bias, split_heads(x, self.groups).transpose(0, 1), weight.transpose(-1, -2)
            )  # (H, B, out / H)
        return copied(out.transpose(0, 1)).flatten(1)


@register(
    "inline",
    formula="o = mean(v) + d^(-1/2) q Cov(k, v) + conv3x3(v; kernel(mean(x)))",
    latex=r"\begin{aligned} o &= \mathrm{mean}(v) + s q \mathrm{Cov}(k, v) + \mathrm{conv}_{3 \times 3}(v), \quad s "
    r"= d^{-1/2} \cr "
    r"\mathrm{Cov}(k, v) &= \frac{1}{N} \sum_j (k_j - \mathrm{mean}(k))^\top (v_j - \mathrm{mean}(v)) "
    r"\end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("Bridging the Divide: Reconsidering Softmax and Linear Attention", "2412.06590", "NeurIPS 2024"),
)
class InLine(Core):
    """Injective linear attention with a per-image dynamic convolution.

    Args:
        feature_map: phi, applied to q and k; "exp" is exp(0.2 x). Every published model uses identity.
        local: the dynamic convolution on v.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    turns = "features"
    rounds = (Covariance(),)
    halo = 1
    reads_residual = True
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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.generator: nn.Sequential | None = None
        if local:
            self.generator = nn.Sequential(
                HeadLinear(dim, dim, num_heads, **factory), nn.GELU(), HeadLinear(dim, 9 * dim, num_heads, **factory)
            )

    def start_neutral(self) -> None:
        """See `Core`: the kernels are zero for every image."""
        if self.generator is not None:
            last = self.generator[-1]
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """mean(v) + s q Cov(k, v), and the local term on the grid."""
        state: InLineReader = done[0]
        local: Convolved | Tensor | None = None
        if state.kernels is not None:
            local = Convolved(grid_values(tokens, tile), tile.seen, state.kernels, None, self.num_heads, True)
            if tile.halo:
                local = tile.inner_grid(local.whole())
        own = tile.inner(tokens.q)
        q = Features(own, self.feature_map, turn=self.turn_of(own, dataclasses.replace(tile, halo=0)))
        return affine_read(q, state.cov, state.v, add=local, dtype=tokens.q.dtype)
