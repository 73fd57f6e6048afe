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
from typing import Any

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
        self.scale = (dim // num_heads) ** -0.5
        shape = (2 * (block_size + 2 * halo_size) - 1, dim // num_heads)
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
                self._attend(taken(q, mine), *(taken(x, theirs, there) for x in (k, v)), down, across)
                for mine, theirs, there in self._cut(q, own, seen, inside)
            ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out.flatten(1, 2).index_select(1, self._home(sides, q.device)).to(tokens.v.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, down: Tensor, across: Tensor) -> Tensor:
        """Outputs `(B, blocks, b*b, H, E)` of queries of that shape and windows `(B, blocks, w*w, H, D)`."""
        side = self.block_size
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))  # (B, blocks, H, places, D)
        square = unflatten(q, 3, (side, side))
        rows = square @ down.transpose(-1, -2)  # (..., y, x, m)
        columns = (square.transpose(3, 4) @ across.transpose(-1, -2)).transpose(3, 4)  # (..., y, x, n)
        far = (rows[..., None] + columns[..., None, :]).flatten(5).flatten(3, 4)
        scores = (q * self.scale) @ k.transpose(-1, -2) + (far * self.scale if self.scale_pos_embed else far)
        return (scores.softmax(dim=-1) @ v).transpose(2, 3)

    def _of_places(self, table: Tensor) -> Tensor:
        """The vectors `(b, w, D)` of each place of a window's side, for each place of a block's side."""
        side, window = self.block_size, self.block_size + 2 * self.halo_size
        place = torch.arange(window, device=table.device) + (window - 1)
        far = place - torch.arange(side, device=table.device)[:, None]
        return table.index_select(0, far.flatten()).view(side, window, -1)

    def _cut(self, q: Tensor, *blocks: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Tables of `blocks`, in so many parts that each makes few scores; whole where gradients are recorded."""
        if torch.is_grad_enabled() or traced():
            return [blocks]
        window = self.block_size + 2 * self.halo_size
        each = q.shape[0] * self.num_heads * (self.block_size * window) ** 2
        return zip(*(table.split(max(1, _AT_ONCE // max(1, each))) for table in blocks), strict=True)

    def _home(self, sides: tuple[int, int], device: torch.device) -> Tensor:
        """Where each token of the grid is among those of the blocks."""
        b = self.block_size
        (block_y, y), (block_x, x) = (divided(torch.arange(side, device=device), b) for side in sides)
        across = (sides[1] + b - 1) // b
        return ((block_y * (across * b * b) + y * b)[:, None] + block_x * (b * b) + x).flatten()

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, block_size={self.block_size}, halo_size={self.halo_size}"


def places(sides: tuple[int, int], block: int, halo: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens of each block and its halo, row by row: `(blocks, (block + 2 halo)^2)`, and whether there is one."""
    found: list[Any] = []
    for side in sides:
        start = torch.arange((side + block - 1) // block, device=device) * block
        place = start[:, None] + torch.arange(-halo, block + halo, device=device)  # (blocks along the side, window)
        found.append((place, (place >= 0) & (place < side)))
    (row, in_rows), (column, in_columns) = found
    inside = in_rows[:, None, :, None] & in_columns[:, None, :]
    at = (row[:, None, :, None] * sides[1] + column[:, None, :]).masked_fill(~inside, 0)
    return at.flatten(2).flatten(0, 1), inside.flatten(2).flatten(0, 1)


def taken(x: Tensor, at: Tensor, inside: Tensor | None = None) -> Tensor:
    """The tokens `(B, blocks, places, H, D)` of `x` `(B, N, H, D)`, zeros where there is none."""
    found = unflatten(x.index_select(1, at.flatten()), 1, at.shape)
    return found if inside is None else found.masked_fill(~inside[..., None, None], 0)
