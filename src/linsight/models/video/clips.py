"""Parts that models of videos share: the door for clips, and how they are cut into patches."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import check_kind
from linsight.errors import LinsightError
from linsight.ops import FittedTable, Grid, Mode, fit_grid, fit_square, is_proxy, traced

MODE: Mode = "bicubic-antialias"  # in which tables of places in a frame are resampled


def check_clips(model: Any, x: Tensor) -> None:
    """Raise a LinsightError unless `x` is `(B, in_chans, T, H, W)` with the model's dtype, on its device."""
    if is_proxy(x):
        raise LinsightError(
            f"torch.fx cannot follow a {type(model).__name__}: take features by hooks on its blocks, or a graph by "
            f"torch.export"
        )
    if traced(x):
        return
    channels = model.in_chans
    if not isinstance(x, Tensor) or x.ndim != 5 or x.shape[1] != channels or not x.shape[2:].numel():
        said = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise LinsightError(f"clips are {said}: this model takes (batch, {channels}, frames, height, width)")
    check_kind(x, next(model.parameters(), None), "clips", "model")


def whole_patches(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Clips `(B, C, T, H, W)`, with zeros at their ends, of whole patches of frames, rows and columns."""
    # Not -side % own: of this form, sizes after padding and strides are simple terms in a graph.
    more = [(side + own - 1) // own * own - side for side, own in zip(x.shape[2:], patch, strict=True)]
    if not traced(x) and not any(more):
        return x
    return F.pad(x, (0, more[2], 0, more[1], 0, more[0]))


def cut(x: Tensor, embed: nn.Conv3d) -> tuple[Tensor, Grid]:
    """Patches of clips by a convolution whose kernel is its stride: `(B, t, h*w, C)`, and the grid of a frame."""
    frames, down, right = embed.kernel_size
    x = embed(whole_patches(x, (frames, down, right)))
    return x.flatten(3).permute(0, 2, 3, 1), Grid(x.shape[3], x.shape[4])


def grid_of(img_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Height and width of the patches of an image, of which the last may be filled up."""
    return -(-img_size[0] // patch), -(-img_size[1] // patch)


def fitted(table: Tensor, old: tuple[int, int] | None, new: tuple[int, int], prefix: int = 0) -> FittedTable | None:
    """A table of places `(1, prefix + h*w, C)` of the grid `old`, of a square one where that is None, for `new`."""
    if table.ndim != 3 or table.shape[1] <= prefix:
        return None
    places = table[:, prefix:]
    found = fit_grid(places, old, new, MODE) if old else fit_square(places, new, MODE)
    return found and found._replace(tensor=torch.cat([table[:, :prefix], found.tensor], dim=1))


def along(table: Tensor, count: int) -> Tensor:
    """A table `(1, t, C)` of places in time, for `count` of them: interpolated where there are others."""
    if not torch.compiler.is_compiling() and table.shape[1] == count:
        return table
    return F.interpolate(table.transpose(1, 2), size=count, mode="linear", align_corners=False).transpose(1, 2)
