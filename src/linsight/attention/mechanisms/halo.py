"""Halo attention: softmax of the tokens of a block over the block and a halo around it, with learnt distances.

Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021 (arXiv 2103.12731),
in the form of timm's HaloNets. The grid is cut into blocks of b x b tokens; with a halo of h, all queries of a block
read the w x w places around it, w = b + 2 h. For a query at (y, x) of its block, place (m, n) of that window has

    score   s q . k_mn + q . (r_(m-y) + c_(n-x)),   s = d^(-1/2)

with vectors r, c for distances along each side, shared by the heads. As published, places beyond the image count: their
keys and values are zero, but their distances are scored. So does what pads a side to whole blocks, or an image of a
batch to its canvas; a dropped token would be such a zero and not be left out, so dropping is refused, as are prefix
tokens, which are in no block.

timm's layer `HaloAttn` has no biases and no output projection, as a convolution follows: its weights load into a layer
with `qkv_bias=False` and `layer.proj = torch.nn.Identity()`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Layout, accumulator, divided, full_precision, mask_tokens, traced, unflatten

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Rename
from ..registry import Paper, register
from ..tokens import Tokens

_AT_ONCE = 2**22  # scores held at once where no gradients are recorded


@register(
    "halo",
    formula="o_i = sum_j softmax_j(d^(-1/2) q_i . k_j + q_i . (r_(y_j-y_i) + c_(x_j-x_i))) v_j, j in the block of i "
    "and a halo",
    latex=r"o_i = \sum_j \mathrm{softmax}_j(s q_i \cdot k_j + q_i \cdot (r_{y_j - y_i} + c_{x_j - x_i})) v_j, \quad s "
    r"= d^{-1/2}, \quad j \text{ in the block of } i \text{ and a halo}",
    family="window",
    also=("HaloNet",),
    complexity="O(N (b + 2h)^2 d)",
    paper=Paper("Scaling Local Self-Attention for Parameter Efficient Visual Backbones", "2103.12731", "CVPR 2021"),
)
class Halo(Core):
    """Softmax in blocks whose keys reach into their neighbours.

    Args:
        block_size: b.
        halo_size: h.
        scale_pos_embed: products with distances are scaled by s, too.
    """

    capabilities = Capabilities(sizes=True)
    structure = Structure(cost=Cost.WINDOWED)
    placed = True
    projections = "q_kv"
    published = (
        Rename("q.", "q.", ones=2),
        Rename("kv.", "kvh.", ones=2),
        Rename("pos_embed.height_rel", "core.height_rel"),
        Rename("pos_embed.width_rel", "core.width_rel"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block_size: int = 8,
        halo_size: int = 3,
        scale_pos_embed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if block_size < 1 or halo_size < 0:
            raise LinsightError(
                f"block_size={block_size}, halo_size={halo_size} of 'halo': a block has a side of 1 or more, its halo "
                f"is 0 or more wide"
            )
        self.num_heads = num_heads
        self.block_size, self.halo_size, self.scale_pos_embed = block_size, halo_size, scale_pos_embed
        self.window = block_size + 2 * halo_size
        self.scale = (dim // num_heads) ** -0.5
        shape = (2 * self.window - 1, dim // num_heads)
        self.height_rel = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=self.scale)

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """Attention of each block to its window."""
        grid, dtype = layout.grid, accumulator(tokens.v.dtype)
        q, k, v = (mask_tokens(x, tokens.keep).to(dtype) for x in tokens[:3])
        sides = (grid.height, grid.width)
        own, _ = places(sides, self.block_size, 0, q.device)
        seen, inside = places(sides, self.block_size, self.halo_size, q.device)
        with full_precision(v):
            down, across = (self._of_places(table.to(dtype)) for table in (self.height_rel, self.width_rel))
            outs = [
                self._attend(taken(q, mine), taken(k, theirs, there), taken(v, theirs, there), down, across)
                for mine, theirs, there in self._cut(q, own, seen, inside)
            ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out.index_select(1, self._home(sides, q.device)).to(tokens.v.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, down: Tensor, across: Tensor) -> Tensor:
        """Outputs `(B, blocks*b*b, H, E)` of queries of that shape and windows `(B, blocks*w*w, H, D)`."""
        side, batch = self.block_size, q.shape[0]
        blocks = q.shape[1] // side**2
        q, k, v = (
            unflatten(x, 1, (blocks, size**2)).flatten(0, 1).transpose(1, 2)  # (B*blocks, H, places, D)
            for x, size in ((q, side), (k, self.window), (v, self.window))
        )
        square = unflatten(q, 2, (side, side))
        rows = square @ down.transpose(-1, -2)  # (..., y, x, m)
        columns = (square.transpose(2, 3) @ across.transpose(-1, -2)).transpose(2, 3)  # (..., y, x, n)
        far = (rows[..., None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        scores = (q * self.scale) @ k.transpose(-1, -2) + (far * self.scale if self.scale_pos_embed else far)
        out = scores.softmax(dim=-1) @ v
        return unflatten(out.transpose(1, 2), 0, (batch, blocks)).flatten(1, 2)

    def _of_places(self, table: Tensor) -> Tensor:
        """The vectors `(b, w, D)` of each place of a window's side, for each place of a block's side."""
        place = torch.arange(self.window, device=table.device) + (self.window - 1)
        far = place - torch.arange(self.block_size, device=table.device)[:, None]
        return table.index_select(0, far.flatten()).view(*far.shape, -1)

    def _cut(self, q: Tensor, own: Tensor, *seen: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """The tables, in so many parts of whole blocks that each makes few scores; whole with gradients recorded."""
        if torch.is_grad_enabled() or traced():
            return [(own, *seen)]
        block, window = self.block_size**2, self.window**2
        each = max(1, _AT_ONCE // max(1, q.shape[0] * self.num_heads * block * window))
        return zip(own.split(each * block), *(table.split(each * window) for table in seen), strict=True)

    def _home(self, sides: tuple[int, int], device: torch.device) -> Tensor:
        """Where each token of the grid is among those of the blocks."""
        b, across = self.block_size, (sides[1] + self.block_size - 1) // self.block_size
        places = divided(torch.arange(sides[0] * sides[1], device=device), sides[1])
        (down, y), (right, x) = (divided(place, b) for place in places)
        return (down * across + right) * (b * b) + y * b + x

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, block_size={self.block_size}, halo_size={self.halo_size}"


def places(sides: tuple[int, int], block: int, halo: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens of each block and its halo, row by row, and whether there is one: `(blocks * (block + 2 halo)^2,)`.

    In one axis: a graph must not ask whether there is one block only.
    """
    side = block + 2 * halo
    down, across = ((length + block - 1) // block for length in sides)
    cell, place = divided(torch.arange(down * across * (side * side), device=device), side * side)
    corners, inner = divided(cell, across), divided(place, side)
    row, column = (corner * block + part - halo for corner, part in zip(corners, inner, strict=True))
    inside = (row >= 0) & (row < sides[0]) & (column >= 0) & (column < sides[1])
    return (row * sides[1] + column).masked_fill(~inside, 0), inside


def taken(x: Tensor, at: Tensor, inside: Tensor | None = None) -> Tensor:
    """The tokens `at` `(n,)` of `x` `(B, N, H, D)`, zeros where there is none."""
    found = x.index_select(1, at)
    return found if inside is None else found.masked_fill(~inside[:, None, None], 0)
