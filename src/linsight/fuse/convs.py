"""Convolutions that take in what stands beside them: batch norm, or the sum with their input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops.misc import Conv2dNormActivation

from linsight.attention import TokenConv
from linsight.attention.parts.context import RepConv
from linsight.models.dense.decoders.base import ConvNormReLU
from linsight.models.parts.conv_pyramid import ConvMerge, ConvNorm
from linsight.models.parts.convs import CPE
from linsight.ops import LayoutLike, accumulator, as_layout, autocasts, depthwise_conv

from .form import form_of


def is_final(module: nn.Module) -> bool:
    """True for a weight that is a parameter in full precision: pruning and parametrizations make it in each call."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dtype == accumulator(weight.dtype)


def conv_norm_form(module: ConvNorm) -> nn.Module:
    """One convolution and the activation; in half precision, where its weights would be rounded again, both."""
    norm: Any = module.bn
    return _joined(module, module.conv, norm, norm.act)


def conv_norm_row_form(module: nn.Sequential) -> nn.Module:
    """A convolution and what follows in a row, with the batch norm between them folded into it."""
    conv, norm, *rest = [*module, None, None][: max(len(module), 2)]
    if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
        return form_of(module, type(module))
    return _joined(module, conv, norm, *rest)


def _joined(module: nn.Module, conv: Any, norm: Any, *rest: Any) -> nn.Module:
    if not (is_final(conv) and is_final(norm)) or norm.running_var is None:
        return form_of(module, type(module))
    rest = tuple(nn.ReLU(inplace=True) if type(part) is nn.ReLU else part for part in rest)
    joined = nn.Sequential(fuse_conv_bn_eval(conv.eval(), norm.eval()), *rest)
    return form_of(joined.requires_grad_(False), nn.Sequential)


def conv_merge_form(module: ConvMerge) -> nn.Module:
    """The convolutions between stages, their activations in place."""
    twin = form_of(module, ConvMerge)
    twin.act = nn.ReLU(inplace=True)
    return twin


class SummedCPE(CPE):
    """A position encoding whose sum with its input is a part of the convolution: a pass less over it."""

    summed: Tensor

    def forward(self, x: Tensor, layout: LayoutLike) -> Tensor:  # type: ignore[override]
        """`(B, P + H*W, C)`; the shape is kept."""
        layout = as_layout(layout)
        whole = layout.sizes is None and not layout.is_packed and not layout.prefix
        if not whole or self.summed.dtype != x.dtype or autocasts(x):
            return super().forward(x, layout)
        return depthwise_conv(x, (layout.grid.height, layout.grid.width), self.summed, self.bias)


def cpe_form(module: CPE) -> nn.Module:
    """With the sum, where its weights are not rounded to half precision."""
    if not is_final(module):
        return form_of(module, type(module))
    twin = form_of(module, SummedCPE)
    with torch.no_grad():
        summed = module.weight.clone()
        summed[:, 0, 1, 1] += 1
    twin._buffers = dict(module._buffers)
    twin.register_buffer("summed", summed, persistent=False)
    return twin


def rep_conv_form(module: RepConv) -> nn.Module:
    """All branches as one convolution, where its weights are not rounded to half precision."""
    if not all(is_final(part) for branch in module.branches() for part in branch):
        return form_of(module, type(module))
    weight = module.lk_origin.weight
    joined = TokenConv(weight.shape[0], module.kernel_size, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        for parameter, value in zip((joined.weight, joined.bias), module.merged(), strict=True):
            parameter.copy_(value)  # type: ignore[union-attr]
    return form_of(joined.requires_grad_(False), TokenConv)


CONV_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    ConvNorm: conv_norm_form,
    ConvNormReLU: conv_norm_row_form,
    Conv2dNormActivation: conv_norm_row_form,  # of heads of torchvision's detectors
    ConvMerge: conv_merge_form,
    CPE: cpe_form,
    RepConv: rep_conv_form,
}
