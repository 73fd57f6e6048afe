"""The base of decoders, and the parts that they share."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from linsight.errors import LinsightError
from linsight.ops import leaves, pool_matrix, traced


class ConvNormReLU(nn.Sequential):
    """A convolution without bias that keeps the size of its map, batch norm and ReLU.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the norm that of all processes.
    """

    def __init__(self, in_dim: int, dim: int, kernel: int = 1, **factory: Any) -> None:
        conv = nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2, bias=False, **factory)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(dim, **factory), nn.ReLU())


class Decoder(nn.Module):
    """Maps of a backbone, as many and at whatever strides there are -> logits at the size of the finest one.

    A subclass has `features`, and passes its maps' `channels`.

    channels: of the maps, the finest first.
    num_classes: of the logits.
    width: channels of what is classified.
    dropout: the rate at which whole channels of it are left out in training.
    factory: `device` and `dtype`.
    """

    def __init__(
        self, channels: Sequence[int], num_classes: int, width: int, *, dropout: float = 0.1, **factory: Any
    ) -> None:
        super().__init__()
        if not channels:
            raise LinsightError("channels=(): a decoder needs the map of one stage at least")
        self.channels, self.num_classes, self.width = tuple(channels), num_classes, width
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(width, num_classes, **factory)

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """`(B, width, H_0, W_0)` of maps `(B, C_i, H_i, W_i)`, of the size of the first."""
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits `(B, num_classes, H_0, W_0)`."""
        return self.classifier(self.dropout(self.features(maps)))

    def reset_classifier(self, num_classes: int) -> None:
        """A new last convolution, for `num_classes` classes."""
        old = self.classifier.weight
        self.num_classes = num_classes
        self.classifier = _classifier(self.width, num_classes, device=old.device, dtype=old.dtype)


class Auxiliary(Decoder):
    """A fully convolutional head on one map, whose loss helps training: 3x3 convolution, batch norm, ReLU, classes.

    It reads the last map but one, the third of four. Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017 (arXiv
    1612.01105), section 3.3.

    weight: of its loss beside that of the decoder.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = 256,
        *,
        dropout: float = 0.1,
        weight: float = 0.4,
        **factory: Any,
    ) -> None:
        super().__init__(channels, num_classes, width, dropout=dropout, **factory)
        self.weight, self.place = weight, max(len(self.channels) - 2, 0)
        self.conv = ConvNormReLU(self.channels[self.place], width, 3, **factory)

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """`(B, width, h, w)`, of the size of its map."""
        return self.conv(maps[self.place])


class Pooled(ConvNormReLU):
    """A map averaged to `size` x `size` places, a 1x1 convolution, batch norm and ReLU, at its own size again."""

    def __init__(self, in_dim: int, dim: int, size: int, **factory: Any) -> None:
        super().__init__(in_dim, dim, **factory)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_dim, H, W)` -> `(B, dim, H, W)`."""
        norm = self[1]
        if self.size == 1 and self.training and type(norm) is nn.BatchNorm2d and not traced(x) and x.shape[0] == 1:
            raise LinsightError(
                "this decoder pools each image to one place, and the batch norm behind that learns from 2 images or "
                "more: pass a larger batch, or take the decoder 'mlp' or 'semantic_fpn'"
            )
        pooled = super().forward(averaged(x, self.size))  # type: ignore[no-untyped-call]
        return resized(pooled, x.shape[2:])


def averaged(x: Tensor, size: int) -> Tensor:
    """A map averaged to `size` x `size` places, of any sides in a graph that leaves, too."""
    if not leaves():
        return F.adaptive_avg_pool2d(x, size)
    for axis in (2, 3):
        matrix = pool_matrix(x.shape[axis], size, device=x.device, dtype=x.dtype)
        x = (matrix @ x) if axis == 2 else x @ matrix.T
    return x


def feature_pyramid(channels: Sequence[int], width: int, *, device: Any = None, dtype: Any = None) -> nn.Module:
    """torchvision's feature pyramid network: a dict of maps, the finest first -> the same, of `width` channels."""
    with torch.device(device) if device is not None else contextlib.nullcontext():
        return FeaturePyramidNetwork(list(channels), width).to(dtype=dtype)


def cut(x: Tensor, height: Any, width: Any) -> Tensor:
    """The first rows and columns of a map."""
    for axis, count in ((2, height), (3, width)):
        # In a graph not by a slice, which would ask whether it is all there is.
        x = x.index_select(axis, torch.arange(count, device=x.device)) if traced(x) else x.narrow(axis, 0, count)
    return x


def resized(x: Tensor, size: Sequence[Any]) -> Tensor:
    """A map at another height and width, bilinear, corners not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _classifier(width: int, num_classes: int, **factory: Any) -> nn.Conv2d:
    conv = nn.Conv2d(width, num_classes, 1, **factory)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
