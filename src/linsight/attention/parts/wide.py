"""Layers in the dtype of their input, whatever that of their weights: for tokens that are in the accumulator's."""

from torch import Tensor, nn
from torch.nn import functional as F


class WideLinear(nn.Linear):
    """A linear layer in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class WideLayerNorm(nn.LayerNorm):
    """A LayerNorm in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)`; the shape is kept."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class WideRMSNorm(nn.RMSNorm):
    """An RMSNorm in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)`; the shape is kept."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
