"""Dynamic convolution: a depthwise convolution whose kernel is a mixture, by the mean token, of a few learned ones.

Yang et al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", NeurIPS 2019 (arXiv
1904.04971), whose shares are sigmoids, and Chen et al., "Dynamic Convolution: Attention over Convolution Kernels", CVPR
2020 (arXiv 1912.03458), whose shares are a softmax. Of tokens x on a grid, with v = W_v x,

    r = softmax(W_r mean_n x_n + b_r),   K = sum_e r_e K_e,   o = conv_K(v)

Both publications have it in the place of the convolutions of a network; here it mixes tokens in the place of attention,
each channel by a kernel (k, k) of its own, and zeros are around the grid. Heads have no effect. Prefix tokens have no
place on the grid, so they are refused. Shares and kernels are made in float32 (float64 for float64).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import (
    Tile,
    accumulator,
    count_tokens,
    dynamic_depthwise_conv,
    full_precision,
    mask_tokens,
)

from ..capabilities import Capabilities, Structure
from ..core import Core
from ..parts.token_conv import grid_values
from ..parts.wide import WideLinear
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens, merge_heads, split_heads


class Sums(NamedTuple):
    """total: `(B, C)` sum x.  tokens: `(B,)` how many were absorbed."""

    total: Tensor
    tokens: Tensor


class MixedKernel(Round):
    """K, of the mean token."""

    of: Literal["keys", "queries"] = "queries"

    def absorb(self, core: "DynamicConv", tokens: Tokens, tile: Tile, done: Done) -> Sums:
        """The sum of the tile's tokens, and their number."""
        x = mask_tokens(merge_heads(tokens.q), tokens.keep)
        return Sums(x.sum(dim=1, dtype=accumulator(x.dtype)), count_tokens(x, tokens.keep))

    def finish(self, core: "DynamicConv", state: Sums, done: Done) -> Tensor:
        """K `(B, C, k, k)`."""
        with full_precision(state.total):
            shares = core.router(state.total / state.tokens.clamp(min=1)[:, None])
            shares = shares.softmax(dim=-1) if core.gate == "softmax" else shares.sigmoid()
            return torch.einsum("be,eckl->bckl", shares, core.kernels.to(shares.dtype))


@register(
    "dynamic_conv",
    formula="o = conv_K(v), K = sum_e r_e K_e, r = softmax(W_r mean_n x_n + b_r)",
    latex=r"o = \mathrm{conv}_K(v), \quad K = \sum_e r_e K_e, \quad r = \mathrm{softmax} \left( \frac{1}{N} W_r "
    r"\sum_n x_n + b_r \right)",
    family="convolution",
    complexity="O(N k^2 d)",
    paper=Paper("Dynamic Convolution: Attention over Convolution Kernels", "1912.03458", "CVPR 2020"),
)
class DynamicConv(Core):
    """A depthwise convolution of the values, by a kernel for each image.

    Args:
        kernel_size: k, odd.
        experts: how many kernels are mixed.
        gate: how: by shares that sum to 1, or each by a sigmoid, as in CondConv.
    """

    capabilities = Capabilities(keep=True, sizes=True)
    structure = Structure(stream=True)
    rounds = (MixedKernel(),)
    projections = "v"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int = 3,
        experts: int = 4,
        gate: Literal["softmax", "sigmoid"] = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise LinsightError(f"kernel_size={kernel_size} of 'dynamic_conv' must be odd, so that it has a middle")
        if experts < 1:
            raise LinsightError(f"experts={experts} of 'dynamic_conv' must be 1 or more; publications have 4 to 32")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.halo, self.gate = num_heads, kernel_size // 2, gate
        self.router = WideLinear(dim, experts, **factory)
        self.kernels = nn.Parameter(torch.empty(experts, dim, kernel_size, kernel_size, **factory))
        for kernel in self.kernels.unbind():  # each as a convolution of its own
            nn.init.kaiming_uniform_(kernel.detach()[:, None], a=math.sqrt(5))

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The convolution of v by K."""
        out = dynamic_depthwise_conv(grid_values(tokens, tile), tile.seen, done[0])
        return split_heads(tile.inner_grid(out), self.num_heads).to(tokens.v.dtype)
