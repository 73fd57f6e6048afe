"""Depthwise convolutions on token sequences `(B, H*W, C)`, row by row, zero padding, stride 1.

Cross-correlation, as in torch. Tap t of a k x k kernel is (t // k, t % k).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .dispatch import fused_form
from .sizes import copied, freezes, leaves, traced, unflatten
from .states import autocasts, full_precision

_FEW = 2**17  # numbers: of more, one compiled convolution is quicker than nine products


def depthwise_conv(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1
) -> Tensor:
    """Convolve each channel by its kernel. `x` `(B, H*W, C)`; `size` (H, W); `weight` `(C, 1, k, k)`; `bias` `(C,)`.

    Taps are `dilation` tokens apart. Computed in the dtype of `weight`, or in autocast's.
    """
    fused = fused_form("depthwise_conv", x) if dilation == 1 else None
    if fused is not None:
        return fused(x, size, weight, bias)
    if not autocasts(x):
        x = x.to(weight.dtype)
    return _convolve(x, size, weight, bias, dilation)


def dynamic_depthwise_conv(x: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
    """Convolve each channel of each image by a kernel of its own.

    `x` `(B, H*W, C)`; `size` (H, W); `kernels` `(B, C, k, k)`.


    The definition is the sum of k*k shifted products, which a compiler can fuse and no group count ties to a batch.
    Run eagerly it would pass over memory k*k times, so there it is one convolution of B*C groups, channels last: the
    channels of all images side by side at each place, which is the cheaper way to copy them. So it is compiled for one
    image, too, if that is not known to be small.
    Computed in the dtype of `kernels`.
    """
    fused = fused_form("dynamic_depthwise_conv", x)
    if fused is not None:
        return fused(x, size, kernels)
    x = x.to(kernels.dtype)
    batch, _, channels = x.shape
    if freezes() or (batch == 0 and not traced()):  # no group count that is kept, or 0
        return shifted_products(x, size, kernels)
    one = statically_known_true(batch == 1) if leaves() else batch == 1  # there, not asked of an example
    if torch.compiler.is_compiling() and (not one or statically_known_true(size[0] * size[1] * channels <= _FEW)):
        return shifted_products(x, size, kernels)
    if one:  # compiled, too: graphs of one image are graphs of their own
        with full_precision(x):
            return _convolve(x, size, kernels.transpose(0, 1))
    beside = x.transpose(0, 1).reshape(1, -1, batch * channels)  # (1, H*W, B * C)
    with full_precision(x):
        out = _convolve(beside, size, kernels.reshape(batch * channels, 1, *kernels.shape[2:]))
    return out.view(-1, batch, channels).transpose(0, 1)


class Convolved(NamedTuple):
    """A depthwise convolution still to be made, so that the one who adds it may make it a few rows at a time.

    x: `(B, H*W, C)`.  size: (H, W).  weight: `(C, 1, k, k)`, or `(B, C, k, k)`, one for each image.  heads: of the
    result `(B, H*W, heads, C / heads)`, which is in the dtype of the weight.
    """

    x: Tensor
    size: tuple[int, int]
    weight: Tensor
    bias: Tensor | None = None
    heads: int = 1
    dynamic: bool = False

    def whole(self) -> Tensor:
        """The convolution of all rows."""
        with full_precision(self.x):
            if self.dynamic:
                out = dynamic_depthwise_conv(self.x, self.size, self.weight)
            else:
                out = depthwise_conv(self.x, self.size, self.weight, self.bias)
        return unflatten(out, -1, (self.heads, -1))

    def rows(self, images: slice, first: int, end: int) -> Tensor:
        """The convolution of the rows from `first` to `end` of some images."""
        (height, width), reach = self.size, self.weight.shape[-1] // 2
        top, bottom = max(0, first - reach), min(height, end + reach)
        seen = self._replace(
            x=self.x[images, top * width : bottom * width],
            size=(bottom - top, width),
            weight=self.weight[images] if self.dynamic else self.weight,
        )
        return seen.whole()[:, (first - top) * width : (end - top) * width]


def made(add: Convolved | Tensor | None) -> Tensor | None:
    """`add`, made if it is a convolution that is still to be made."""
    return add.whole() if isinstance(add, Convolved) else add


def _convolve(
    x: Tensor, size: tuple[int, int], weight: Tensor, bias: Tensor | None = None, dilation: int = 1
) -> Tensor:
    """torch's convolution of a dense copy: it would bring any other view to (B, C, H, W) order in memory."""
    batch, _, channels = x.shape
    canvas = copied(x.contiguous().view(batch, *size, channels).permute(0, 3, 1, 2))
    pad = int(weight.shape[-1]) // 2 * dilation  # which torch.jit.trace has as a tensor
    out = F.conv2d(canvas, weight, bias, padding=pad, dilation=dilation, groups=channels)
    return out.permute(0, 2, 3, 1).flatten(1, 2)


def shifted_products(x: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
    """`dynamic_depthwise_conv` by its definition: sum over taps of x shifted by the tap, times the tap."""
    height, width = size
    k = int(kernels.shape[-1])  # which torch.jit.trace has as a tensor
    pad = k // 2
    canvas = F.pad(unflatten(x, 1, size), (0, 0, pad, pad, pad, pad))  # (B, H + 2p, W + 2p, C)
    taps = kernels.flatten(2).permute(2, 0, 1)[:, :, None, None]  # (k*k, B, 1, 1, C)
    out = canvas[:, :height, :width] * taps[0]
    for t in range(1, k * k):
        dy, dx = divmod(t, k)
        out = out + canvas[:, dy : dy + height, dx : dx + width] * taps[t]
    return out.flatten(1, 2)
