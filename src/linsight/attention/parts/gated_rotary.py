"""Cores of a gated layer whose heads are rotated on the grid: RALA's (arXiv 2411.07635), and of those that follow it.

    out = proj((o + conv5x5(v)) * x_o)

where x_o is a fourth projection of the input, without an activation. Each head is rotated alone: the first half of its
channels by the row of the token, the second half by its column. The angles of one step, one for each channel of a half,
are a buffer that checkpoints hold (`angle`): 10000^(-t), t from 0 to 1 in d / 4 steps, each for a pair of channels.
Channels (2i, 2i + 1) turn as a pair,

    (x cos(r angle_2i) - y sin(r angle_2i), y cos(r angle_(2i+1)) + x sin(r angle_(2i+1))).
"""

from typing import ClassVar

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Tile, unflatten

from ..capabilities import Capabilities
from ..core import Core, Rename
from ..tokens import Tokens, split_heads
from .token_conv import TokenConv, add_behind, convolved_values


class GatedRotary(Core):
    """The layer around what a mechanism mixes: rotation, convolution of v, gate."""

    angle: Tensor
    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    halo = 2
    projections = "qkvx"
    open_gate = 1.0
    turned: ClassVar[int] = 1  # widths of a head that are rotated together
    published: ClassVar[tuple[Rename, ...]] = (
        Rename("qkvo.", "qkv.", ones=2),
        Rename("proj.", "proj.", ones=2),
        Rename("lepe.", "core.lepe."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = dim // num_heads
        if width % 4:
            raise LinsightError(f"each head is rotated on the grid: its width must be divisible by 4, not {width}")
        self.num_heads = num_heads
        self.extra_dim = dim
        angle = 1e4 ** -torch.linspace(0, 1, self.turned * width // 4, device=device)
        self.register_buffer("angle", angle.repeat_interleave(2).to(dtype or torch.get_default_dtype()))
        self.lepe = TokenConv(dim, 5, device=device, dtype=dtype)

    def rotated(self, x: Tensor, tile: Tile) -> Tensor:
        """`x` `(B, n, H, D)`, in the accumulator's dtype, of all that `tile` sees, turned by its places."""
        (top, bottom), (left, right) = tile.rows, tile.columns
        rows, columns = (
            (torch.arange(last - first, device=x.device, dtype=x.dtype) + first)[:, None] * self.angle.to(x.dtype)
            for first, last in ((top, bottom), (left, right))
        )
        angles = torch.cat(
            [rows[:, None].expand(-1, right - left, -1), columns.expand(bottom - top, -1, -1)], dim=-1
        ).flatten(0, 1)[:, None]
        spatial = x[:, tile.prefix :]
        a, b = unflatten(spatial, -1, (-1, 2)).unbind(-1)
        turned = spatial * angles.cos() + torch.stack([-b, a], dim=-1).flatten(-2) * angles.sin()
        return torch.cat([x[:, : tile.prefix], turned], dim=1) if tile.prefix else turned

    def gated(self, out: Tensor, tokens: Tokens, tile: Tile) -> Tensor:
        """(out + conv(v)) * x_o, of `out` `(B, n, H, E)`, the tile's own tokens."""
        if tokens.extra is None:
            raise LinsightError("the gate of this mechanism is a fourth projection: it needs projections='qkvx'")
        out = add_behind(out, convolved_values(self.lepe, tokens, tile), tile.prefix)
        return self.join(out, split_heads(tile.inner(tokens.extra), self.num_heads)).to(tokens.q.dtype)

    def join(self, out: Tensor, gate: Tensor) -> Tensor:
        """How `out` and the gate come together, both `(B, n, H, E)`."""
        return out * gate
