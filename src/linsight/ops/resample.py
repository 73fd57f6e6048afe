"""Maps brought to another grid as two small matrices, one for rows and one for columns.

A map `(h, w, C)` becomes R_y map R_x^T. The matrices are made of comparisons only, so any size can be
symbolic, a tile takes the rows and columns it needs, and each image of a padded batch has its own.
"""

import math
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from .layout import Grid, Tile
from .sizes import product, traced, unflatten
from .states import accumulator, full_precision

Mode = Literal["bilinear", "bicubic", "bilinear-antialias", "bicubic-antialias"]


def resize_matrix(
    old: int,
    new: int | Tensor,
    mode: Mode,
    *,
    start: int = 0,
    count: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows `start` to `start + count` of the `(new, old)` matrix of `F.interpolate`, align_corners=False.

    "bilinear-antialias" and "bicubic-antialias" are its antialias=True.

    `new` may be `(B,)`, a length for each image; then `count` is needed, the result is `(B, count, old)`, and
    `device` is that of `new`.
    """
    length: Any = new
    if per_image := _each(new):
        length, device = new[:, None, None].to(dtype), new.device
    places: Any = new - start if count is None else count
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    place = torch.arange(places, **factory)[:, None] + (start + 0.5)
    place = place * (old / length) - 0.5  # where each new sample falls among the old ones
    if mode == "bilinear":
        place = place.clamp(0, old - 1)
        weights = (1 - (place - torch.arange(old, **factory)).abs()).clamp(min=0)
    elif mode.endswith("-antialias"):
        # The kernel widens where the table shrinks; taps beyond the rim do not count, and padding stays at the rim.
        wide: Any = (old / length).clamp(min=1) if isinstance(length, Tensor) else torch.sym_max(old / length, 1.0)
        distance = (place.clamp(max=old - 0.5) - torch.arange(old, **factory)).abs()
        distance = distance / wide
        weights = _cubic(distance, -0.5) if mode == "bicubic-antialias" else (1 - distance).clamp(min=0)
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        # Taps beyond the rim are those of the rim.
        taps = _cubic((place - torch.arange(-2, old + 2, **factory)).abs())
        weights = taps[..., 2:-2].clone()
        weights[..., 0] += taps[..., :2].sum(-1)
        weights[..., -1] += taps[..., -2:].sum(-1)
    return weights if per_image else weights.reshape(places, old)


def _each(length: Any) -> TypeGuard[Tensor]:
    """True for `(B,)`, a length for each image; one of all is no tensor, but under torch.jit.trace one of no axes."""
    return isinstance(length, Tensor) and length.ndim > 0


def _cubic(x: Tensor, a: float = -0.75) -> Tensor:
    """Keys' cubic convolution kernel at distance `x`; a is that of torch, which has another one for antialiasing."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def pool_matrix(
    old: int | Tensor,
    new: int,
    *,
    start: int = 0,
    count: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Columns `start` to `start + count` of the `(new, old)` matrix of adaptive average pooling.

    Bin i is the mean of floor(i r) to ceil((i + 1) r), r = old / new; bins overlap where r is no integer. `old`
    may be `(B,)`, a length for each image; then `count` is needed, the result is `(B, new, count)`, and `device`
    is that of `old`.
    """
    length: Any = old
    if per_image := _each(old):
        length, device = old[:, None, None], old.device
    places: Any = old - start if count is None else count
    bins, place = torch.arange(new, device=device)[:, None], torch.arange(places, device=device) + start
    first = bins * length // new
    last = ((bins + 1) * length + new - 1) // new
    inside = ((place >= first) & (place < last)).to(dtype)
    weights = inside / (last - first)
    return weights if per_image else weights.reshape(new, places)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """R_y x R_x^T: `x` `(..., h, w, C)`, `rows` `(..., H, h)`, `columns` alike -> `(..., H, W, C)`."""
    with full_precision(x):
        x = unflatten(product(rows.to(x), x.flatten(-2)), -1, (columns.shape[-1], x.shape[-1]))  # (..., H, w, C)
        columns = columns if columns.ndim == 2 else columns.unsqueeze(-3)
        return product(columns.to(x), x)


def table_for(table: Tensor, size: tuple[int, int], tile: Tile, mode: Mode) -> Tensor:
    """A position table `(1, h*w, C)` of a grid of `size`, at the tokens of `tile` (halo included, no prefix).

    Returns `(1 or B, n, C)` in the accumulator's dtype. At its own size the table is returned as it is.
    """
    grid = tile.grid
    table = table.to(accumulator(table.dtype))
    native = not traced() and (grid.height, grid.width) == tuple(size) and tile.sizes is None
    if native:
        return tile.take_grid(table)
    (top, bottom), (left, right) = tile.rows, tile.columns
    height, width = (grid.height, grid.width) if tile.sizes is None else tile.sizes.to(table.device).unbind(1)
    factory: dict[str, Any] = {"device": table.device, "dtype": table.dtype}
    rows = resize_matrix(size[0], height, mode, start=top, count=bottom - top, **factory)
    columns = resize_matrix(size[1], width, mode, start=left, count=right - left, **factory)
    canvas = unflatten(table, 1, tuple(size))
    if tile.sizes is not None:
        return separable(canvas.expand(rows.shape[0], -1, -1, -1), rows, columns).flatten(1, 2)
    return separable(canvas[0], rows, columns).flatten(0, 1)[None]  # a batch of 1 would be guarded in exported graphs


class FittedTable(NamedTuple):
    """A table brought to another grid, and both heights and widths."""

    tensor: Tensor
    old: tuple[int, int]
    new: tuple[int, int]


def fit_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: Mode) -> FittedTable | None:
    """A table `(1, h*w, C)` of the grid `old`, for the grid `new`; None where it has other rows, or is no table."""
    if table.ndim != 3 or len(table) != 1 or table.shape[1] != old[0] * old[1]:
        return None
    resampled = table_for(table, old, Tile.whole(Grid(*new)), mode)
    return FittedTable(resampled.to(table.dtype), old, new)


def fit_square(table: Tensor, new: tuple[int, int], mode: Mode) -> FittedTable | None:
    """A table `(1, n, C)` of a square grid, for the grid `new`; None where n is no square, or it is no table."""
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    return fit_grid(table, (side, side), new, mode) if side else None
