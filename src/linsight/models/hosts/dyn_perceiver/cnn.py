"""The convolutional branches of Dynamic Perceiver: torchvision's networks, cut into a stem and four stages."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.layers import calculate_drop_path_rates, drop_path
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.regnet import BlockParams, RegNet, ResBottleneckBlock, SimpleStemIN
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

from linsight.attention import Rename, recast
from linsight.errors import LinsightError, UnknownNameError


class Cut(NamedTuple):
    """A network in parts.

    widths: channels after the stem and after each stage.
    hidden: width of a hidden layer in the classifier, 0 for none.
    drop: dropout before the network's own classifier, or inside one with a hidden layer.
    head_std: of the classifier's initial weights; None for PyTorch's default.
    published: the names of its parts in published checkpoints.
    """

    stem: nn.Sequential
    stages: Sequence[nn.Module]
    widths: tuple[int, ...]
    hidden: int = 0
    drop: float = 0.0
    head_std: float | None = None
    published: tuple[Rename, ...] = ()


class _RegNet(NamedTuple):
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_width: int


# RegNet-Y (arXiv 2003.13678), as torchvision's rule for the widths rounds them.
_REGNETS = {
    "regnet_y_400mf": _RegNet((1, 3, 6, 6), (48, 104, 208, 440), 8),
    "regnet_y_800mf": _RegNet((1, 3, 8, 2), (64, 144, 320, 784), 16),
    "regnet_y_1_6gf": _RegNet((2, 6, 17, 2), (48, 120, 336, 888), 24),
    "regnet_y_3_2gf": _RegNet((2, 5, 13, 1), (72, 216, 576, 1512), 24),
}
_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
_MOBILENET = "mobilenet_v3_large"
# Where MobileNetV3-Large is cut, in its `features`.
_MOBILENET_CUTS = (0, 3, 5, 8, 14, 17)
CNNS = (*_REGNETS, *_RESNETS, _MOBILENET)


def cut(
    name: str, width: float = 1.0, stem_stride: int | None = None, *, in_chans: int = 3, drop_path_rate: float = 0.0
) -> Cut:
    """A network of `CNNS` in parts, its channels times `width`, which is 1 for a RegNet.

    stem_stride: how much smaller the map is that the stem gives, for small images; None: the network's own.
    drop_path_rate: of the last residual branch; that of the others grows linearly up to it.
    """
    if name not in CNNS:
        raise UnknownNameError("convolutional network", name, CNNS)
    strides = (1, 2) if name in _REGNETS else (1, 2, 4)
    stem_stride = strides[-1] if stem_stride is None else stem_stride
    if stem_stride not in strides:
        raise LinsightError(f"stem_stride={stem_stride}: for {name} it is one of {', '.join(map(str, strides))}")
    if name in _REGNETS and width != 1:
        raise LinsightError(f"width={width}: that of {name} is its own, take another of {', '.join(_REGNETS)}")
    if name in _REGNETS:
        parts = _regnet(name, in_chans, stem_stride)
    elif name in _RESNETS:
        parts = _resnet(name, width, in_chans, stem_stride)
    else:
        parts = _mobilenet(width, in_chans, stem_stride)
    if drop_path_rate:
        _drop_branches(parts.stages, drop_path_rate)
    return parts


def _regnet(name: str, in_chans: int, stem_stride: int) -> Cut:
    spec = _REGNETS[name]
    four = len(spec.depths)
    params = BlockParams([*spec.depths], [*spec.widths], [spec.group_width] * four, [1.0] * four, [2] * four, 0.25)
    net = RegNet(params, num_classes=1, stem_type=lambda _, *rest: SimpleStemIN(in_chans, *rest))
    _set_stride(net.stem[0], stem_stride)
    blocks = (Rename(f"cnn_body.block{i + 1}.", f"stages.{i}.") for i in range(four))
    return Cut(
        net.stem,
        [*net.trunk_output],
        (net.stem.out_channels, *spec.widths),
        head_std=0.01,
        published=(Rename("cnn_stem.", "stem."), *blocks),
    )


def _mobilenet(width: float, in_chans: int, stem_stride: int) -> Cut:
    net = mobilenet_v3_large(width_mult=width, num_classes=1)
    first, second = net.features[0], net.features[2].block
    if in_chans != 3:
        first[0] = nn.Conv2d(in_chans, first.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(first[0].weight, mode="fan_out")
    _set_stride(first[0], 2 if stem_stride == 4 else 1)
    _set_stride(second[1][0], 1 if stem_stride == 1 else 2)
    parts = [nn.Sequential(*net.features[a:b]) for a, b in itertools.pairwise(_MOBILENET_CUTS)]
    hidden, _, drop, _ = net.classifier
    return Cut(
        parts[0],
        parts[1:],
        tuple(part[-1].out_channels for part in parts),  # type: ignore[misc]
        hidden=hidden.out_features,
        drop=drop.p,
        head_std=0.01,
        published=_BY_STAGE,
    )


def _resnet(name: str, width: float, in_chans: int, stem_stride: int) -> Cut:
    block, depths = _RESNETS[name]
    planes = [int(width * base) for base in (64, 128, 256, 512)]
    kernel, stride = (7, 2) if stem_stride == 4 else (3, 1)
    pool = nn.Identity() if stem_stride == 1 else nn.MaxPool2d(3, 2, 1)
    stem = nn.Sequential(*Conv2dNormActivation(in_chans, planes[0], kernel, stride), pool)
    stages, widths = [], [planes[0]]
    for i, (plane, depth) in enumerate(zip(planes, depths, strict=True)):
        stages.append(_resnet_stage(block, widths[-1], plane, depth, stride=2 if i else 1))
        widths.append(plane * block.expansion)
    for part in (stem, *stages):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(_branch_norm(module).weight)
    return Cut(stem, stages, tuple(widths), drop=0.2, published=_BY_STAGE)


def _resnet_stage(block: type[BasicBlock | Bottleneck], in_dim: int, plane: int, depth: int, stride: int) -> nn.Module:
    dim = plane * block.expansion
    shortcut = None
    if stride != 1 or in_dim != dim:
        shortcut = Conv2dNormActivation(in_dim, dim, 1, stride, activation_layer=None)
    return nn.Sequential(block(in_dim, plane, stride, shortcut), *(block(dim, plane) for _ in range(depth - 1)))


_BY_STAGE = (
    Rename("cnn_stem.", "stem."),
    *(Rename(f"cnn_body_stage{i + 1}.", f"stages.{i}.") for i in range(4)),
)


def _set_stride(conv: nn.Conv2d, stride: int) -> None:
    conv.stride = (stride, stride)


class _DroppedNorm(nn.BatchNorm2d):
    """The batch norm at the end of a residual branch, which training drops whole for some of the images."""

    rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Batch norm, then stochastic depth."""
        return drop_path(super().forward(x), self.rate, self.training)


def _drop_branches(stages: Sequence[nn.Module], rate: float) -> None:
    """Give the residual branches of `stages` stochastic depth. Their parameters stay what they are."""
    names = [{module: name for name, module in stage.named_modules()} for stage in stages]
    norms = [
        (i, norm) for i, modules in enumerate(names) for part in modules if (norm := _branch_norm(part)) is not None
    ]
    for (i, norm), p in zip(norms, calculate_drop_path_rates(rate, len(norms)), strict=True):
        dropped = recast(norm, _DroppedNorm)
        dropped.rate = p
        stages[i].set_submodule(names[i][norm], dropped)


def _branch_norm(block: nn.Module) -> Any:
    """The last norm of a block's residual branch; None where the module is no residual block."""
    if isinstance(block, Bottleneck):
        return block.bn3
    if isinstance(block, BasicBlock):
        return block.bn2
    if isinstance(block, ResBottleneckBlock):
        return block.f.c[1]
    return block.block[-1][1] if isinstance(block, InvertedResidual) and block.use_res_connect else None
