"""A model from pixels to probabilities: what `eval` and `predict` do to an image, in the graph."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import resize_matrix, separable

CROPS = ("squash", "center")
_MODES: dict[str, Literal["bilinear-antialias", "bicubic-antialias"]] = {
    "bilinear": "bilinear-antialias",
    "bicubic": "bicubic-antialias",
}


class Served(nn.Module):
    """A classifier of whole images: resized, cropped and normalised in the graph, which ends in probabilities.

    Resizing is that of Pillow, up to its rounding to whole numbers: a kernel that widens where the image shrinks.

    Args:
        model: from normalised images `(B, C, H, W)` to logits `(B, K)`.
        size: height and width of the images that the model is given.
        mean, std: of each channel, in 0..1.
        interpolation: "bilinear" or "bicubic".
        crop_pct: the share of the resized image that the crop keeps, along a side.
        crop_mode: "squash" brings both sides to the size, "center" keeps their ratio, for a square size.

    Raises:
        LinsightError: another interpolation or crop.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        crop_mode: str = "squash",
    ) -> None:
        super().__init__()
        if interpolation not in _MODES:
            raise LinsightError(f"interpolation={interpolation} has no form in a graph: {', '.join(_MODES)} have")
        if crop_mode not in CROPS:
            raise LinsightError(f"the crop '{crop_mode}' has no form in a graph: {', '.join(CROPS)} have")
        if crop_mode == "center" and size[0] != size[1]:
            raise LinsightError(f"the crop 'center' is square, the size {size[0]}x{size[1]} is not: take 'squash'")
        self.model, self.size, self.mode = model, size, _MODES[interpolation]
        self.resized = tuple(int(side / crop_pct) for side in size)
        self.keeps_ratio = crop_mode == "center"
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 `(B, H, W, C)` of any height and width -> probabilities `(B, K)`."""
        height, width = pixels.shape[1:3]
        sides: tuple[Any, ...] = self.resized
        if self.keeps_ratio:  # the shorter side becomes the size, the longer is cut down to a whole number
            short = torch.sym_min(height, width)
            sides = self.resized[0] * height // short, self.resized[1] * width // short
        rows, columns = (
            resize_matrix(old, new, self.mode, start=_start(new, side), count=side, device=pixels.device)
            for old, new, side in zip((height, width), sides, self.size, strict=True)
        )
        images = separable(pixels.to(self.mean.dtype), rows, columns)
        images = images.round().clamp(0, 255).permute(0, 3, 1, 2)
        return self.model((images - self.mean) / self.std).softmax(dim=-1)


def _start(resized: Any, side: int) -> Any:
    """Where a crop in the middle begins, rounded to even as torchvision's."""
    half, odd = (resized - side) // 2, (resized - side) % 2
    return half + odd * (half % 2)
