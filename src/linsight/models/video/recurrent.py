"""The temporal block of TRecViT: a gated linear recurrence over the frames of a clip, the RG-LRU.

De et al., "Griffin" (arXiv 2402.19427), in the block of Patraucean et al. (arXiv 2412.14294): see `trecvit`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import accumulator, full_precision, linear_scan

NORM_EPS = 1e-6
_LEAST = 1 / (4 * 1000.0**2)  # the gradient of a root is as of this where its argument is less


class BlockDiagonal(nn.Module):
    """A linear map of `groups` blocks of channels, each to itself."""

    def __init__(self, dim: int, groups: int, **factory: Any) -> None:
        super().__init__()
        width = dim // groups
        self.w = nn.Parameter(torch.empty(groups, width, width, **factory))
        self.b = nn.Parameter(torch.zeros(groups, width, **factory))
        nn.init.normal_(self.w, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)`; the shape is kept, computed in the dtype of `x`."""
        parts = x.unflatten(-1, (self.w.shape[0], -1))
        return (torch.einsum("...gi,gij->...gj", parts, self.w.to(x.dtype)) + self.b.to(x.dtype)).flatten(-2)


class RGLRU(nn.Module):
    """The recurrence h of v over time, see above.

    Args:
        dim: R.
        groups: blocks of the two gates.
    """

    def __init__(self, dim: int, groups: int, **factory: Any) -> None:
        super().__init__()
        self.input_gate = BlockDiagonal(dim, groups, **factory)
        self.a_gate = BlockDiagonal(dim, groups, **factory)
        self.a_param = nn.Parameter(torch.empty(dim, **factory))
        with torch.no_grad():
            least, most = 0.5**2, 0.999**2  # squares of a, where the gate is half open
            squares = torch.rand_like(self.a_param) * (most - least) + least + 1e-8
            self.a_param.copy_(torch.log(torch.expm1(-0.5 * squares.log())))

    def forward(self, v: Tensor) -> Tensor:
        """`(B, T, ..., R)` to the same shape, in the accumulator's dtype."""
        v = v.to(accumulator(v.dtype))
        with full_precision(v):
            decay = -8.0 * self.a_gate(v).sigmoid() * F.softplus(self.a_param.to(v.dtype))  # log a
            write = self.input_gate(v).sigmoid() * v
            scale = _root(-torch.expm1(2 * decay))
            write = torch.cat([write[:, :1], (scale * write)[:, 1:]], dim=1)
            return linear_scan(decay.exp(), write)


def _root(x: Tensor) -> Tensor:
    """sqrt(x), whose gradient is 1000 at most."""
    steep = x * (0.5 * _LEAST**-0.5)
    steep = steep + (x.detach().sqrt() - steep.detach())  # the value of the one, the gradient of the other
    return torch.where(x < _LEAST, steep, x.clamp(min=_LEAST).sqrt())


class Conv1d(nn.Module):
    """A causal depthwise convolution over time: the last of `width` taps is of the frame itself."""

    def __init__(self, dim: int, width: int, **factory: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(width, dim, **factory))
        self.b = nn.Parameter(torch.zeros(dim, **factory))
        nn.init.normal_(self.w, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, ..., dim)`; the shape is kept, zero before the first frame."""
        width, out = self.w.shape[0], x * self.w[-1] + self.b
        for back in range(1, width):
            past = torch.cat([torch.zeros_like(x[:, :1]).expand(-1, back, *x.shape[2:]), x], dim=1)
            out = out + past[:, : x.shape[1]] * self.w[width - 1 - back]
        return out


class ScaledNorm(nn.Module):
    """RMSNorm times 1 + scale."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)`; the shape is kept."""
        return F.rms_norm(x, self.scale.shape, (1 + self.scale).to(x.dtype), NORM_EPS)


class RecurrentBlock(nn.Module):
    """W_out (h y) of normed tokens."""

    def __init__(self, dim: int, groups: int, conv_width: int, **factory: Any) -> None:
        super().__init__()
        self.linear_y = nn.Linear(dim, 2 * dim, **factory)
        self.linear_x = nn.Linear(dim, 2 * dim, **factory)
        self.conv_1d = Conv1d(2 * dim, conv_width, **factory)
        self.rg_lru = RGLRU(2 * dim, groups, **factory)
        self.linear_out = nn.Linear(2 * dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, ..., C)`; the shape is kept."""
        y = F.gelu(self.linear_y(x), approximate="tanh")
        h = self.rg_lru(self.conv_1d(self.linear_x(x)))
        return self.linear_out((h * y).to(y.dtype))


class TemporalBlock(nn.Module):
    """The temporal block: `(B, T, ..., C)`, each place of a frame by itself.

    Args:
        dim: C.
        num_heads: blocks of the gates.
        conv_width: frames that the convolution sees.
    """

    def __init__(self, dim: int, num_heads: int, conv_width: int = 4, **factory: Any) -> None:
        super().__init__()
        self.temporal_pre_norm = ScaledNorm(dim, **factory)
        self.recurrent_block = RecurrentBlock(dim, num_heads, conv_width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream; the shape is kept."""
        return x + self.recurrent_block(self.temporal_pre_norm(x))
