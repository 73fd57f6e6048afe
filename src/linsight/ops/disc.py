"""Softmax attention of each token to those within a radius on the grid, and to some that all see: O(N r^2) by blocks.

    o_i = sum_j softmax_j(s q_i . k_j) v_j,   j with (y_i - y_j)^2 + (x_i - x_j)^2 < r^2, or one of the others

A disc is cut at the rim of the grid, and never moved inward. The grid is cut into blocks of queries, max(4, r) tokens a
side; all discs of a block lie in it and a margin of r - 1 tokens around it, so a block is one masked attention, to less
than 9 times as many keys on the grid as it has queries.

    +-------------+
    |   margin    |
    |   +-----+   |
    |   |block|   |
    |   +-----+   |
    +-------------+
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Tile
from .pooled import attend
from .sizes import divided, traced, unflatten
from .states import full_precision

_LEAST = 4  # tokens a side of a block
_AT_ONCE = 2**25  # numbers gathered at once where no gradients are recorded


class SharedKeys(NamedTuple):
    """Keys that every query sees. k: `(B, n, H, D)`.  v: `(B, n, H, E)`.  seen: `(B or 1, n)`, False where not."""

    k: Tensor
    v: Tensor
    seen: Tensor


class _Side(NamedTuple):
    """Some blocks along one axis, b queries and s keys long.

    own: `(blocks, b)` places of queries, from the first of the tile on; the last one again where there are no more.
    near: `(blocks, s)` places of keys, from the first that is seen on.
    apart: `(blocks, b, s)` their squared distances; r^2 where there is no key.
    """

    own: Tensor
    near: Tensor
    apart: Tensor

    @classmethod
    def of(cls, block: Tensor, start: Any, count: Any, seen: tuple[Any, Any], radius: int) -> "_Side":
        """The blocks with these numbers of `count` places from `start` on; keys lie between the two of `seen`."""
        side, device = block_side(radius), block.device
        corner = block[:, None] * side + start
        own = (torch.arange(side, device=device) + corner).clamp(max=start + count - 1)
        near = torch.arange(1 - radius, side + radius - 1, device=device) + corner
        inside = (near >= seen[0]) & (near < seen[1])
        apart = (own[:, :, None] - near[:, None]).square().masked_fill(~inside[:, None], radius * radius).int()
        return cls(own - start, (near - seen[0]).clamp(min=0).clamp(max=seen[1] - seen[0] - 1), apart)


class _Given(NamedTuple):
    """Arguments of `disc_attention`, q, k and v in one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    tile: Tile
    radius: int
    keep: Tensor | None
    shared: SharedKeys | None
    scale: float | None

    @property
    def across(self) -> Any:
        """Blocks side by side."""
        return _blocks(self.tile.width, block_side(self.radius))


def block_side(radius: int) -> int:
    """Tokens a side of a block of queries."""
    return max(_LEAST, radius)


def _blocks(length: Any, side: int) -> Any:
    return (length + side - 1) // side


def disc_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile: Tile,
    radius: int,
    *,
    keep: Tensor | None = None,
    shared: SharedKeys | None = None,
    scale: float | None = None,
) -> Tensor:
    """Outputs `(B, n, H, E)` of the own grid tokens of `tile`, whose halo has to cover radius - 1 tokens.

    `q` `(B, n, H, D)` are those of its own grid tokens, `k` `(B, m, H, D)` and `v` `(B, m, H, E)` those that it sees,
    all finite. In the dtype of `v`, and computed in the widest of the three; a query that sees no key has an output of
    0. Without gradients, so many blocks at once that memory does not grow with what is gathered.

    Args:
        radius: r, 1 or more, in tokens.
        keep: `(B, m)`, False where a key is not to be seen.
        shared: keys that all queries see, besides.
        scale: s, in the place of D^(-1/2).
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    given = _Given(q.to(dtype), k.to(dtype), v.to(dtype), tile, radius, keep, shared, scale)
    parts = [_attend(given, blocks) for blocks in _cut(given)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return out.to(v.dtype).index_select(1, _places(given))


def _cut(given: _Given) -> tuple[Tensor, ...]:
    """The numbers of all blocks, row by row, in so many parts that each gathers little; in one if it is recorded."""
    side, device = block_side(given.radius), given.v.device
    count = _blocks(given.tile.height, side) * given.across
    if traced():  # the last one twice: a graph would ask whether there is one alone
        return (torch.arange(count + 1, device=device).clamp(max=count - 1),)
    if torch.is_grad_enabled():
        return (torch.arange(count, device=device),)
    batch, _, heads, width = given.v.shape
    keys = (side + 2 * (given.radius - 1)) ** 2 + (given.shared.k.shape[1] if given.shared else 0)
    each = batch * keys * max(heads * width, side * side)
    return torch.arange(count, device=device).split(max(1, _AT_ONCE // max(1, each)))


def _attend(given: _Given, numbers: Tensor) -> Tensor:
    """Outputs `(B, blocks * b * b, H, E)` of the blocks with these numbers."""
    q, k, v, tile, radius, keep, shared, scale = given
    down, right = divided(numbers, given.across)
    rows = _Side.of(down, tile.top, tile.height, tile.rows, radius)
    columns = _Side.of(right, tile.left, tile.width, tile.columns, radius)
    own = (rows.own[:, :, None] * tile.width + columns.own[:, None]).flatten()
    near = (rows.near[:, :, None] * tile.seen[1] + columns.near[:, None]).flatten()
    apart = rows.apart[:, :, None, :, None] + columns.apart[:, None, :, None]
    seen = (apart < radius * radius).flatten(3).flatten(1, 2)[None]  # (1, blocks, b * b, s * s)
    queries, keys = (int(size) for size in seen.shape[2:])
    if keep is not None:
        seen = seen & unflatten(keep.index_select(1, near), 1, (-1, keys))[:, :, None]

    def blocks(x: Tensor, places: Tensor, each: int) -> Tensor:  # (B, n, H, D) to (B * blocks, H, each, D)
        return unflatten(x.index_select(1, places), 1, (-1, each)).flatten(0, 1).transpose(1, 2)

    batch, count = v.shape[0], numbers.shape[0]
    q, k, v = blocks(q, own, queries), blocks(k, near, keys), blocks(v, near, keys)
    seen = seen.expand(batch, -1, -1, -1)
    if shared is not None:
        others = (x.to(v.dtype).transpose(1, 2)[:, None].expand(-1, count, -1, -1, -1) for x in shared[:2])
        k, v = (torch.cat([x, other.flatten(0, 1)], dim=2) for x, other in zip((k, v), others, strict=True))
        seen = torch.cat([seen, shared.seen[:, None, None].expand(batch, count, queries, -1)], dim=-1)
    with full_precision(v):
        out = attend(q, k, v, seen.flatten(0, 1)[:, None], scale=scale)
    return unflatten(out.transpose(1, 2), 0, (-1, count)).flatten(1, 2)


def _places(given: _Given) -> Tensor:
    """Where each own token of the tile, row by row, is among the queries block by block."""
    tile, side = given.tile, block_side(given.radius)
    row, column = divided(torch.arange(tile.height * tile.width, device=given.v.device), tile.width)
    (down, y), (right, x) = divided(row, side), divided(column, side)
    return ((down * given.across + right) * side + y) * side + x
