"""Segmenters and detectors from pixels to masks and boxes: what `eval` and `predict` do to an image, in the graph."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.data.dense import scaled
from linsight.ops import resize_matrix

from .served import Pixels

_LARGE = 256  # classes, from which on they are no uint8


@runtime_checkable
class Found(Protocol):
    """A model of one image, whose outputs are of as many objects as there are in it: `linsight.models.dense`.

    least: the score that objects have at least.
    """

    least: float

    def telling(self, images: Sequence[Tensor]) -> float:
        """A least score by which something is found."""

    def error_of(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
        """The error of objects."""


def as_graph(model: nn.Module) -> nn.Module:
    """The model, or the form of it that gives tensors for a tensor, where it has one."""
    return model.as_graph() if hasattr(model, "as_graph") else model  # type: ignore[operator]


class Resized(Pixels):
    """The base of models of whole images, which keep their shape.

    Args:
        model, mean, std, interpolation: as of `Pixels`.
        side: the shorter side that images are resized to; 0 leaves them as they are.
        longest: the longer one, at most, where the shorter one gives way.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        interpolation: str = "bicubic",
        side: int = 0,
        longest: int = 0,
    ) -> None:
        super().__init__(as_graph(model), mean, std, interpolation)
        self.side, self.longest = side, longest

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 `(B, H, W, C)` -> `(B, C, h, w)` of whole numbers in 0..255."""
        images = pixels.permute(0, 3, 1, 2).to(self.mean.dtype)
        if not self.side:
            return images
        sizes = zip(images.shape[2:], self._sides(*images.shape[2:]), strict=True)
        return self.by_matrices(images, *(resize_matrix(*pair, self.mode, device=images.device) for pair in sizes))

    def _sides(self, height: Any, width: Any) -> tuple[Any, ...]:
        """Height and width that an image is resized to."""
        shorter, longer = torch.sym_min(height, width), torch.sym_max(height, width)
        found = []
        for own in (height, width):
            new = scaled(own, self.side, shorter)
            if self.longest:
                new = torch.sym_min(new, scaled(own, self.longest, longer))
            found.append(named(torch.sym_max(new, 2)))
        return tuple(found)


def named(size: Any) -> Any:
    """A size, 2 or more; in a graph under a name of its own: with its formula in the sizes of all that follows, torch
    takes minutes to write them and, each time, to read them."""
    if not isinstance(size, torch.SymInt):
        return size
    own = torch.scalar_tensor(size, dtype=torch.int64).item()
    torch._check(own >= 2)
    return own


class ServedMasks(Resized):
    """A segmenter of whole images: (resized and) normalised in the graph, which ends in a mask.

    See `Resized`. model: from normalised images `(B, C, H, W)` to logits `(B, K, H, W)`.
    """

    outputs = ("mask",)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 `(B, H, W, C)` -> the class of each pixel `(B, H, W)`, uint8, or int16 of more than 256 classes."""
        logits = self.model(self.normalised(self.prepare(pixels))).float()
        if self.side:
            logits = F.interpolate(logits, pixels.shape[1:3], mode="bilinear")
        return logits.argmax(1).to(torch.uint8 if logits.shape[1] <= _LARGE else torch.int16)


class ServedObjects(Resized):
    """A detector of whole images: resized and normalised in the graph, which ends in objects, in the pixels given.

    See `Resized`. model: a detector of `linsight.models.dense`.
    """

    model: Any

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 `(1, H, W, C)` -> boxes, labels, scores, and masks `(N, H, W)` of bool where the method has them."""
        images = self.prepare(pixels)
        found = self.model(self.normalised(images))
        height, width = (own / given for own, given in zip(pixels.shape[1:3], images.shape[2:], strict=True))
        boxes = found["boxes"]
        own = {**found, "boxes": torch.stack([boxes[:, 0::2] * width, boxes[:, 1::2] * height], dim=2).flatten(1)}
        if "masks" in found:
            masks = found["masks"]
            if self.side:
                masks = F.interpolate(masks, pixels.shape[1:3], mode="bilinear")
            own["masks"] = masks[:, 0] > 0.5
        return own

    @property
    def least(self) -> float:
        """See `Found`."""
        return float(self.model.least)

    @least.setter
    def least(self, score: float) -> None:
        self.model.least = score

    def telling(self, pixels: Sequence[Tensor]) -> float:
        """See `Found`."""
        return float(self.model.telling([self.normalised(self.prepare(image)) for image in pixels]))

    def error_of(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
        """See `Found`."""
        return float(self.model.error_of(found, wanted))
