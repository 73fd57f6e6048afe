"""A model from pixels to probabilities: what `eval` and `predict` do to an image, in the graph."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import resize_matrix

CROPS = ("squash", "center", "border")
_MODES: dict[str, Literal["bilinear-antialias", "bicubic-antialias"]] = {
    "bilinear": "bilinear-antialias",
    "bicubic": "bicubic-antialias",
}


class Pixels(nn.Module):
    """The base of models that take uint8 `(B, H, W, C)` of any height and width, and prepare them in the graph.

    outputs: names of what they give, where that is no dict.

    Args:
        model: of normalised images `(B, C, H, W)`; its dtype may be half, pixels stay in float32.
        mean, std: of each channel, in 0..1.
        interpolation: "bilinear" or "bicubic".

    Raises:
        LinsightError: another interpolation.
    """

    outputs: ClassVar[tuple[str, ...]] = ()
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], interpolation: str) -> None:
        super().__init__()
        if interpolation not in _MODES:
            raise LinsightError(
                f"interpolation '{interpolation}' has no form in a graph, {' and '.join(_MODES)} have: export without "
                f"--preprocess"
            )
        self.model, self.mode, self.interpolation = model, _MODES[interpolation], interpolation
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) * 255, persistent=False)

    def preparation(self) -> dict[str, Any]:
        """The arguments by which images are prepared, by name."""
        mean, std = ((values.flatten() / 255).tolist() for values in (self.mean, self.std))
        return {"mean": tuple(mean), "std": tuple(std), "interpolation": self.interpolation}

    def normalised(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` of 0..255 as the model takes them."""
        dtype = next((p.dtype for p in self.model.parameters()), images.dtype)
        return ((images - self.mean) / self.std).to(dtype)

    def by_matrices(self, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Images resized, rounded to whole numbers after either side, as Pillow does it."""
        images = (images @ columns.T + 0.5).floor().clamp(0, 255)
        return (rows @ images + 0.5).floor().clamp(0, 255)


class Served(Pixels):
    """A classifier of whole images: resized, cropped and normalised in the graph, which ends in probabilities.

    Resizing is that of Pillow: a kernel that widens where the image shrinks, columns first, rounded to whole numbers
    after either side; colours count by their opacity. The crops are timm's.

    Args:
        model: from normalised images `(B, C, H, W)` to logits `(B, K)`; its dtype may be half, pixels stay in float32.
        size: height and width of the images that the model is given.
        mean, std: of each channel, in 0..1.
        interpolation: "bilinear" or "bicubic".
        crop_pct: the share of the resized image that the crop keeps, along a side.
        crop_mode: "squash" brings both sides to the size, "center" keeps their ratio and cuts, "border" keeps it and
            fills with the mean.

    Raises:
        LinsightError: another interpolation or crop.
    """

    outputs = ("probabilities",)

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
        super().__init__(model, mean, std, interpolation)
        if crop_mode not in CROPS:
            raise LinsightError(f"the crop '{crop_mode}' has no form in a graph: {', '.join(CROPS)} have")
        self.size, self.crop_pct, self.crop_mode = size, crop_pct, crop_mode
        self.resized = tuple(int(side / crop_pct) for side in size)

    def preparation(self) -> dict[str, Any]:
        """See `Pixels`."""
        return {**super().preparation(), "crop_pct": self.crop_pct, "crop_mode": self.crop_mode}

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 `(B, H, W, C)` of any height and width -> probabilities `(B, K)`."""
        return self.model(self.normalised(self.prepare(pixels))).float().softmax(dim=-1)

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 `(B, H, W, C)` -> `(B, C, *size)` of whole numbers in 0..255."""
        sides = self._sides(*pixels.shape[1:3])
        axes = [_Axis(*of) for of in zip(pixels.shape[1:3], sides, self.size, strict=True)]
        images = pixels.permute(0, 3, 1, 2).to(self.mean.dtype)
        if images.shape[1] == 4:
            moved = torch.sym_min(sum(abs(axis.old - axis.new) for axis in axes), 1)  # 0 where it is only cut
            opacity = 255 - (255 - images[:, 3:]) * moved
            premultiplied = (images[:, :3] * opacity / 255 + 0.5).floor()
            images = self._resize(torch.cat([premultiplied, opacity, images[:, 3:]], dim=1), axes)
            colours, opacity, alpha = images.split([3, 1, 1], dim=1)
            whole = (opacity == 0) | (opacity == 255)
            colours = torch.where(whole, colours, (255 * colours / opacity.clamp(min=1)).floor().clamp(max=255))
            images = torch.cat([colours, alpha], dim=1)
        else:
            images = self._resize(images, axes)
        if self.crop_mode != "border":
            return images
        rows, columns = (axis.inside(images.device) for axis in axes)
        return torch.where(rows[:, None] & columns, images, self.mean.round())

    def _sides(self, height: Any, width: Any) -> tuple[Any, ...]:
        """Height and width that an image is resized to, before it is cropped."""
        tall, wide = self.resized
        if self.crop_mode == "squash":
            return tall, wide
        if self.crop_mode == "center" and tall == wide:  # torchvision rounds down, timm to the nearest
            short = torch.sym_min(height, width)
            return tall * height // short, wide * width // short
        pick = torch.sym_max if self.crop_mode == "center" else torch.sym_min
        found = pick(tall, _nearest(height * wide, width)), pick(wide, _nearest(width * tall, height))
        return tuple(torch.sym_max(side, 1) for side in found)

    def _resize(self, images: Tensor, axes: "list[_Axis]") -> Tensor:
        rows, columns = (axis.matrix(self.mode, self.crop_mode == "border", images.device) for axis in axes)
        return self.by_matrices(images, rows, columns)


class _Axis:
    """One side of an image: `old` pixels are resized to `new`, of which `size` are cut out, or which are padded."""

    def __init__(self, old: Any, new: Any, size: int) -> None:
        self.old, self.new, self.size = old, new, size
        over, under = torch.sym_max(new - size, 0), torch.sym_max(size - new, 0)
        half, odd = over // 2, over % 2
        self.start = half + odd * (half % 2) - under // 2  # rounded to even, as torchvision's

    def matrix(self, mode: Any, padded: bool, device: torch.device) -> Tensor:
        """Weights `(size, old)` of the pixels; those of padding are of no use."""
        if not padded:
            return resize_matrix(self.old, self.new, mode, start=self.start, count=self.size, device=device)
        whole = resize_matrix(self.old, self.new, mode, device=device)
        return whole[self._places(device).clamp(min=0).minimum(torch.full((), self.new - 1, device=device))]

    def inside(self, device: torch.device) -> Tensor:
        """`(size,)`, False where there is padding."""
        places = self._places(device)
        return (places >= 0) & (places < self.new)

    def _places(self, device: torch.device) -> Tensor:
        return torch.arange(self.size, device=device) + self.start


def _nearest(a: Any, b: Any) -> Any:
    """`a / b`, both whole, to the nearest whole number, halves to even."""
    found = (2 * a + b) // (2 * b)
    tie = 1 - torch.sym_min((2 * a + b) % (2 * b), 1)
    return found - tie * (found % 2)
