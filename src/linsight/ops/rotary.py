"""Rotary position embedding of tokens on a grid: pairs of channels (2i, 2i + 1) turn by an angle.

With C channels, m = C / 4 speeds theta_j = b^(-j/m): the first m pairs turn by row * theta_j, the next m by
column * theta_j. Real arithmetic, in float32 or float64; positions are whole numbers from 0, so those of a tile are its
own and any size works.

C may be all channels of a token, and heads split afterwards, so each has axes and speeds of its own; with b = 10000,
that is part of what the published weights of MLLA (arXiv 2405.16605) and ViT^3 (arXiv 2512.01643) mean. Or it is the
width of a head, so each has both axes and all speeds; then b = 100, as in Heo et al., "Rotary Position Embedding for
Vision Transformer", ECCV 2024 (arXiv 2403.13298): a side of a grid has about the root of as many places as a text.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linsight.errors import LinsightError

from .layout import Tile
from .sizes import unflatten
from .states import accumulator

_BASE = 10000.0
HEAD_BASE = 100.0  # of heads that are turned each alone


def check_rotary(dim: int) -> None:
    """Raise a LinsightError unless `dim` channels can be rotated on a grid."""
    if dim % 4:
        raise LinsightError(f"a rotary embedding on a grid needs a width divisible by 4, not {dim}")


class Turn(NamedTuple):
    """The rotation of the tokens of a tile.

    cos, sin: `(h + w, m)`, of the angles of its rows, then of its columns, halo included.  size: (h, w).
    prefix: tokens in front, that are not turned.
    heads: parts of the channels, alike turned. Of each, what 4 m channels leave over is not.
    """

    cos: Tensor
    sin: Tensor
    size: tuple[int, int]
    prefix: int
    heads: int = 1

    @classmethod
    def of(
        cls,
        tile: Tile,
        dim: int,
        *,
        heads: int = 1,
        base: float = _BASE,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "Turn":
        """The rotation of `dim` channels, those of `heads`, of the tokens of `tile`. `dtype` is float32 or float64."""
        (top, bottom), (left, right) = tile.rows, tile.columns
        quarter = dim // heads // 4
        speed = base ** (-torch.arange(quarter, device=device, dtype=dtype) / quarter)
        rows = torch.arange(bottom - top, device=device, dtype=dtype) + top
        columns = torch.arange(right - left, device=device, dtype=dtype) + left
        angles = torch.cat([rows, columns])[:, None] * speed
        return cls(angles.cos(), angles.sin(), (bottom - top, right - left), tile.prefix, heads)

    def part(self, tokens: slice) -> "Turn":
        """The rotation of some of the tokens: whole rows, with the prefix in front of the first."""
        height, width = self.size
        prefix = self.prefix if tokens.start == 0 else 0
        top, bottom = ((place - self.prefix) // width for place in (tokens.start + prefix, tokens.stop))
        cos, sin = (torch.cat([table[top:bottom], table[height:]]) for table in (self.cos, self.sin))
        return type(self)(cos, sin, (bottom - top, width), prefix, self.heads)

    def rotate(self, x: Tensor) -> Tensor:
        """`x` `(B, prefix + h*w, C)` -> the same shape, in the accumulator's dtype."""
        x = x.to(self.cos.dtype)
        prefix, spatial = x[:, : self.prefix], x[:, self.prefix :]
        turned = self.turned(spatial)
        return torch.cat([prefix, turned], dim=1) if self.prefix else turned

    def turned(self, x: Tensor) -> Tensor:
        """Grid tokens `(B, h*w, C)`, turned."""
        cos, sin = self._places(self.cos), self._places(self.sin)
        heads = unflatten(x, -1, (self.heads, -1))
        turning = 4 * self.cos.shape[-1]
        a, b = unflatten(heads[..., :turning], -1, (-1, 2)).unbind(-1)
        out = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        if heads.shape[-1] > turning:
            out = torch.cat([out, heads[..., turning:]], dim=-1)
        return out.flatten(-2)

    def _places(self, table: Tensor) -> Tensor:
        """Spread `(h + w, m)` to `(h * w, 1, 2 m)`: the first half of the pairs turns with the row."""
        height, width = self.size
        rows = table[:height, None].expand(-1, width, -1)
        columns = table[height:].expand(height, -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, None]


def rotate(x: Tensor, tile: Tile) -> Tensor:
    """`x` `(B, n, C)`, the tokens of `tile` with their prefix, turned by their positions; prefix tokens are not.

    Returns the accumulator's dtype.
    """
    return Turn.of(tile, x.shape[-1], device=x.device, dtype=accumulator(x.dtype)).rotate(x)
