"""CLEAR: softmax attention of each token to those within a radius, and to prefix tokens, which see all and all see.

Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", arXiv 2412.16112, by its
published code: the attention of FLUX.1 cut to discs, whose weights go on with a short distillation. Prefix tokens, the
text there, have no place on the grid. With T of them, N tokens on the grid and a scale s,

    o_i = sum_j softmax_j(s q_i . k_j) v_j,   j any token for a prefix token i; else a prefix token, or one with
                                              (y_i - y_j)^2 + (x_i - x_j)^2 < r^2

The distance is Euclidean and strictly below r, in tokens: a radius of 8, 16, 32 has 193, 793, 3205 keys on the grid.
Published radii are these; discs are cut at the rim.

With `down_factor` f, tokens on the grid, but not those of the prefix, see all cells of f x f, too: sums over a cell of
w_ab k and of w_ab v, w (f, f) learned from 1 / f^2, one for all heads and channels, and what is summed are turned keys.
Published is f = 4 with r = 8 and 16. These N / f^2 further keys of each query grow with the grid, and do not stream.
Published sides are divisible by f; here the last token of a side is there again where a cell is cut. Tokens of a cell
have their places, so such cores drop none.

s is d^(-1/2), or, with `proportional` = M keys that the weights were trained with, as at a higher resolution than that,

    s = (log_M L / d)^(1/2),   L = T + N, or 10 (T + N) with down_factor, as published

of each image, without dropped tokens. M is 4608 of FLUX.1 at 1024 x 1024 pixels.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    LogSumExp,
    SharedKeys,
    Tile,
    accumulator,
    attend,
    count_tokens,
    disc_attention,
    divided,
    full_precision,
    gather_state,
    mask_tokens,
    take_tokens,
    traced,
    unflatten,
)

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Rename
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens

_BEYOND = 10  # times as many keys are counted with pooled ones, as published


class Ahead(NamedTuple):
    """The prefix tokens q, k `(B, T, H, D)` and v `(B, T, H, E)`, in the accumulator's dtype.

    kept: `(B, T)`, 0 of dropped ones.  count: `(B,)` tokens absorbed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


class Prefix(Round):
    """The prefix tokens, for all tiles, and the number of all tokens."""

    def absorb(self, core: "Clear", tokens: Tokens, tile: Tile, done: Done) -> Ahead:
        """The tokens of the tile at the origin, else zeros."""
        count, prefix = count_tokens(tokens.v, tokens.keep), tile.prefix
        keep = None if tokens.keep is None else tokens.keep[:, :prefix]
        q, k, v = (x[:, :prefix].to(count.dtype) for x in tokens[:3])
        kept = q.new_ones(q.shape[:2]) if keep is None else keep.to(q.dtype)
        missing = tile.grid.prefix - prefix
        # Zeros by padding: they belong to the graph, as on other ranks.
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, mask_tokens(k, keep), mask_tokens(v, keep)))
        return Ahead(q, k, v, F.pad(kept, (0, missing)), count)


class Overview(Round):
    """The means of v that prefix tokens see, under softmax over all keys: `(B, H, T, E)`."""

    def absorb(self, core: "Clear", tokens: Tokens, tile: Tile, done: Done) -> LogSumExp:
        """Sums of the tile's keys, relative to their largest score."""
        q = done[0].q * core.share(done[0].count)
        return gather_state(q, tokens.k, tokens.v, None, tokens.keep)

    def finish(self, core: "Clear", state: LogSumExp, done: Done) -> Tensor:
        """The means."""
        return state.mean()

    def at_once(self, core: "Clear", tokens: Tokens, tile: Tile, done: Done) -> Tensor | None:
        """By scaled dot-product attention in their own dtype, as these means are outputs: no other token reads them.

        None where there are no prefix tokens.
        """
        if not tile.prefix:
            return None
        q, scale = core.scaled(tokens.q[:, : tile.prefix], tokens, tile, done[0].count)
        dtype = torch.promote_types(torch.promote_types(q.dtype, tokens.k.dtype), tokens.v.dtype)
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, *(mask_tokens(x, tokens.keep) for x in tokens[1:3])))
        with full_precision(v):
            return attend(q, k, v, None if tokens.keep is None else tokens.keep[:, None, None], scale=scale)


@register(
    "clear",
    formula="o_i = sum_j softmax_j(d^(-1/2) q_i . k_j) v_j, j within a radius of i on the grid, or a prefix token",
    latex=r"o_i = \sum_j \mathrm{softmax}_j(d^{-1/2} q_i \cdot k_j) v_j, \quad \lVert p_i - p_j \rVert \lt r \text{ or "
    r"} i \text{ or } j \text{ a prefix token}",
    family="window",
    complexity="O(N r^2 d)",
    paper=Paper(
        "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up", "2412.16112", "NeurIPS 2025"
    ),
)
class Clear(Core):
    """Softmax attention in a disc around each token, and of prefix tokens to all.

    Args:
        radius: r, in tokens; published as window size.
        down_factor: f, the side of cells that are seen from everywhere; 1 for none.
        proportional: M, the number of keys that scores were trained with, which a larger image then sharpens; 0 for
            the same scale at any number.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True, cost=Cost.WINDOWED)
    turns = "tokens"
    rounds = (Prefix(), Overview())
    published = (Rename("spatial_weight", "core.spatial_weight"),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        radius: int = 8,
        down_factor: int = 1,
        proportional: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if radius < 1:
            raise LinsightError(f"radius={radius} of 'clear' must be 1 or more, in tokens; published are 8, 16 and 32")
        if down_factor < 1:
            raise LinsightError(f"down_factor={down_factor} of 'clear' must be 1, for no cells, or more")
        if proportional < 0 or proportional == 1:
            raise LinsightError(f"proportional={proportional} of 'clear' is a number of keys, 2 or more, or 0 for none")
        self.num_heads, self.radius, self.down_factor, self.proportional = num_heads, radius, down_factor, proportional
        self.halo = radius - 1
        self.spatial_weight = None
        if down_factor > 1:
            shape = (1, 1, 1, down_factor, 1, down_factor, 1)  # as published
            weight = torch.full(shape, 1 / down_factor**2, device=device, dtype=dtype)
            self.spatial_weight = nn.Parameter(weight)
            self.capabilities = self.capabilities._replace(keep=False)
            self.structure = self.structure._replace(stream=False)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Means of v over discs, prefix tokens and cells; of prefix tokens what they saw."""
        ahead, overview = done
        prefix, dtype = tile.prefix, tokens.v.dtype
        keep = None if tokens.keep is None else tokens.keep[:, prefix:]
        q, scale = self.scaled(tile.inner_grid(tokens.q[:, prefix:]), tokens, tile, ahead.count)
        k, v = (mask_tokens(x, tokens.keep)[:, prefix:] for x in tokens[1:3])
        shared = SharedKeys(ahead.k, ahead.v, ahead.kept > 0) if tile.grid.prefix else None
        if self.down_factor > 1:
            shared = self.cells(k, v, tile, shared)
        out = disc_attention(q, k, v, tile, self.radius, keep=keep, shared=shared, scale=scale)
        return torch.cat([overview.transpose(1, 2).to(dtype), out], dim=1) if prefix else out

    def scaled(self, q: Tensor, tokens: Tokens, tile: Tile, count: Tensor) -> tuple[Tensor, float | None]:
        """Queries `(B, n, H, D)`, and s where it is another than d^(-1/2) of these.

        A number where all images have one; else queries are scaled, in the accumulator's dtype, which is then that of
        products, too: they would be rounded another time.
        """
        if not self.proportional:
            return q, None
        if tokens.keep is None and tile.sizes is None and not traced():
            keys = tile.grid.tokens * (_BEYOND if self.down_factor > 1 else 1)
            return q, math.sqrt(math.log(keys) / math.log(self.proportional) / q.shape[-1])
        return q.to(count.dtype) * self.share(count), None

    def share(self, count: Tensor) -> Tensor | float:
        """The part of s beyond d^(-1/2), `(B, 1, 1, 1)`, for images of `count` `(B,)` tokens."""
        if not self.proportional:
            return 1.0
        keys = count.clamp(min=1) * (_BEYOND if self.down_factor > 1 else 1)
        return (keys.log() / math.log(self.proportional)).sqrt()[:, None, None, None]

    def cells(self, k: Tensor, v: Tensor, tile: Tile, shared: SharedKeys | None) -> SharedKeys:
        """Keys and values of the grid `(B, n, H, D)` summed over its cells, behind those that are shared already."""
        assert self.spatial_weight is not None
        take, seen = cells_of(tile, self.down_factor, k.device)
        weight = self.spatial_weight.flatten().to(accumulator(k.dtype))

        def pooled(x: Tensor) -> Tensor:
            found = unflatten(take_tokens(x, take), 1, (-1, self.down_factor**2))
            return (found * weight[:, None, None]).sum(dim=2)

        k, v = pooled(k), pooled(v)
        if shared is None:
            return SharedKeys(k, v, seen)
        seen = torch.cat([shared.seen, seen.expand(k.shape[0], -1)], dim=1)
        return SharedKeys(torch.cat([shared.k, k], dim=1), torch.cat([shared.v, v], dim=1), seen)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, radius={self.radius}, down_factor={self.down_factor}"


def cells_of(tile: Tile, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens of the cells of a whole grid, `(B or 1, cells * side * side)`; True `(B or 1, cells)` where one is.

    The last token of a side is there again where a cell is cut. In a padded batch, images have cells of their own.
    """
    sizes: Any = tile.grid[:2] if tile.sizes is None else tile.sizes.to(device)[..., None].unbind(1)
    down, across = ((length + side - 1) // side for length in tile.grid[:2])
    cell, place = divided(torch.arange(down * across * side * side, device=device)[None], side * side)
    corners, places = divided(cell, across), divided(place, side)
    y, x = (corner * side + place for corner, place in zip(corners, places, strict=True))
    inside = (y < sizes[0]) & (x < sizes[1])
    last = [torch.zeros_like(y[:, :1]) + (length - 1) for length in sizes]
    take = torch.minimum(y, last[0]) * tile.grid.width + torch.minimum(x, last[1])
    return take, unflatten(inside, 1, (-1, side * side))[..., 0]
