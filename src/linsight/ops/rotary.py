"""Rotary position embedding of tokens on a grid, over all channels of a token: pairs (2i, 2i + 1) turn by an angle.

With C channels, m = C / 4 speeds theta_j = 10000^(-j/m): the first m pairs turn by row * theta_j, the others by
column * theta_j. Heads are split afterwards, so each has axes and speeds of its own; that is part of what the
published weights of MLLA (arXiv 2405.16605) and ViT^3 (arXiv 2512.01643) mean. Real arithmetic, in float32 or
float64; positions are whole numbers from 0, so those of a tile are its own and any size works.
"""

import torch
from torch import Tensor

from linsight.errors import LinsightError

from .layout import Tile
from .states import accumulator

_BASE = 10000.0


def check_rotary(dim: int) -> None:
    """Raise a LinsightError unless `dim` channels can be rotated on a grid."""
    if dim % 4:
        raise LinsightError(f"a rotary embedding on a grid needs a width divisible by 4, not {dim}")


def rotary_angles(tile: Tile, dim: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Angles `(n, dim / 2)` of the tokens of `tile`, halo included, prefix tokens left out."""
    factory = {"device": device, "dtype": dtype}
    (top, bottom), (left, right) = tile.rows, tile.columns
    quarter = dim // 4
    speed = _BASE ** (-torch.arange(quarter, **factory) / quarter)  # type: ignore[call-overload]
    rows = (torch.arange(bottom - top, **factory) + top)[:, None] * speed  # type: ignore[call-overload]
    columns = (torch.arange(right - left, **factory) + left)[:, None] * speed  # type: ignore[call-overload]
    size = (bottom - top, right - left, quarter)
    return torch.cat([rows[:, None].expand(size), columns.expand(size)], dim=-1).flatten(0, 1)


def rotate(x: Tensor, tile: Tile) -> Tensor:
    """`x` `(B, n, C)`, the tokens of `tile` with their prefix, turned by their positions; prefix tokens are not.

    Returns the accumulator's dtype.
    """
    x = x.to(accumulator(x.dtype))
    angles = rotary_angles(tile, x.shape[-1], device=x.device, dtype=x.dtype)
    cos, sin = torch.cos(angles), torch.sin(angles)
    prefix, spatial = x[:, : tile.prefix], x[:, tile.prefix :]
    a, b = spatial.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([prefix, turned], dim=1) if tile.prefix else turned
