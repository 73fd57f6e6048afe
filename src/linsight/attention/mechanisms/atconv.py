"""Attentive convolution: each channel of each image is convolved by a kernel that is made of what the image holds.

"Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency" (arXiv 2510.20092),
by its published code. For a kernel of k x k taps, with a = W_k x and v = W_v x,

    p_c = the means of a_c over k^2 parts of the image
    w_c = W_g GELU(p_c) + b_g                        one matrix for all channels
    w_c <- w_c - sigmoid(delta_c) mean(w_c)          lateral inhibition
    y_c = the cross-correlation of v_c with w_c, zeros around the image

without a softmax and without heads. The parts are those of adaptive average pooling along one axis, the tokens row by
row: bands of rows, not cells of a grid, so an image turned on its side has other kernels.

Kernels are all that is global: sums of the k^2 parts merge, so it streams. Parts are cut by the number of tokens, which
is why tokens cannot be dropped; images of a padded batch have parts and a rim of their own. Prefix tokens have no place
in a convolution, and are refused.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Tile,
    accumulator,
    dynamic_depthwise_conv,
    full_precision,
    mask_tokens,
    outer_sum,
    spread,
    unflatten,
)

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..parts.token_conv import grid_values
from ..parts.wide import WideLinear
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens, merge_heads, split_heads


class Kernels(Round):
    """The kernels `(B, C, k, k)`, of the means of the keys over parts of the image."""

    placed = True

    def absorb(self, core: "ATConv", tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The tile's share of the means `(B, C, k^2)`."""
        dtype = accumulator(tokens.k.dtype)
        a = mask_tokens(merge_heads(tokens.k), tokens.keep).to(dtype)
        shares = spread(band_shares(tile, core.kernel_size**2, a.device, dtype), a.shape[0])
        with full_precision(a):
            return outer_sum(a[:, :, None], shares[:, :, None])[:, 0]

    def finish(self, core: "ATConv", state: Tensor, done: Done) -> Tensor:
        """The kernels that the means make, less a share of the mean tap."""
        with full_precision(state):
            taps = core.kernel_gen(F.gelu(state))
        share = core.difference.to(taps.dtype).sigmoid()
        taps = taps - share[:, None] * taps.mean(dim=-1, keepdim=True)
        return unflatten(taps, -1, (core.kernel_size, core.kernel_size))


def band_shares(tile: Tile, bins: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight of each token of `tile`, without a halo, in the mean of each of `bins` parts of its grid.

    `(1 or B, n, bins)`. The tokens are counted row by row; part i is from floor(i N / bins) to ceil((i + 1) N / bins).
    Tokens outside of an image of a padded batch have the weights of others.
    """
    height, width = (
        tile.grid[:2] if tile.sizes is None else tile.sizes.to(device)[:, :, None, None].unbind(1)
    )  # each (B, 1, 1), or a number
    rows = torch.arange(tile.height, device=device)[None, :, None] + tile.top
    columns = torch.arange(tile.width, device=device) + tile.left
    place = (rows * width + columns).flatten(1)[..., None]  # (1 or B, n, 1)
    count: Any = height * width
    part = torch.arange(bins, device=device)
    first, last = part * count // bins, ((part + 1) * count + bins - 1) // bins  # (bins,), or (B, 1, bins)
    return ((place >= first) & (place < last)).to(dtype) / (last - first)


@register(
    "atconv",
    formula="y_c = v_c * w_c, w_c = W_g GELU(pool(k_c)), less sigmoid(delta_c) of its mean",
    latex=r"y_c = v_c \ast w_c, \quad w_c = g_c - \sigma(\delta_c)  \mathrm{mean}(g_c), \quad "
    r"g_c = W_g \mathrm{GELU}(\mathrm{pool}(k_c)) + b_g",
    family="convolution",
    also=("AttNet",),
    complexity="O(N d^2)",
    paper=Paper(
        "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency",
        "2510.20092",
    ),
)
class ATConv(Core):
    """A convolution by kernels of each image; heads have no effect.

    Args:
        kernel_size: k, the side of the kernels, odd.
    """

    capabilities = Capabilities(sizes=True)
    structure = Structure(stream=True)
    rounds = (Kernels(),)
    projections = "k_v"
    published = (
        Rename("kernel_proj.", "k.", ones=2),
        Rename("x_proj.", "v.", ones=2),
        Rename("proj.", "proj.", ones=2),
        Rename("kernel_gen.", "core.kernel_gen."),
        Rename("difference_control", "core.difference"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise LinsightError(f"kernel_size={kernel_size} of 'atconv' must be odd: a token is in the middle")
        self.num_heads, self.kernel_size = num_heads, kernel_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernel_gen = WideLinear(kernel_size**2, kernel_size**2, **factory)
        self.difference = nn.Parameter(torch.zeros(dim, **factory))
        self.halo = kernel_size // 2

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The convolution of the values."""
        out = dynamic_depthwise_conv(grid_values(tokens, tile), tile.seen, done[0])
        return split_heads(tile.inner_grid(out).to(tokens.v.dtype), self.num_heads)

    def no_weight_decay(self) -> set[str]:
        """The shares of inhibition, as published."""
        return {"difference"}

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}"
