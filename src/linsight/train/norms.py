"""Batch norms over several processes: the statistics of training are those of all images of a batch.

torch's SyncBatchNorm is for GPUs, and replaces a module by another, of whose kind a subclass of batch norm is not. Here
each module stays what it is, and its `F.batch_norm` sees the moments of all processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


def synchronised(model: nn.Module) -> nn.Module:
    """Let the batch norms of a model, in place, take the moments of all processes when they train."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__dict__["forward"] = _Forward(module)
    return model


class _Forward:
    """The stand-in for the `forward` of a batch norm. It is entered anew where activations are recomputed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any) -> Any:
        with _AllMoments():
            return type(self.module).forward(self.module, *args)


class _AllMoments(TorchFunctionMode):
    """Inside, a batch norm in training is one over all processes."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`(B, C, ...)` -> the same, normed over the images and places of all processes (Ioffe and Szegedy, ICML 2015)."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = x if x.dtype is torch.float64 else x.float()
    count = wide.new_tensor([x.numel() // x.shape[1]])
    sums = _Sum.apply(torch.cat([wide.sum(axes), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    shape = [1, -1, *[1] * (x.dim() - 2)]
    centred = wide - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(axes)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    out = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        out = out * weight.to(wide.dtype).view(shape)
    if bias is not None:
        out = out + bias.to(wide.dtype).view(shape)
    return out.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is that of the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.clone()
        dist.all_reduce(own)
        return own
