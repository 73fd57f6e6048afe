"""WeightFormer: no attention; what an image contains is written into the weights of two layers.

"Linear-Time Global Visual Modeling without Explicit Attention" (arXiv 2605.01711). With the published code:

DynLinear, C_in -> C_out, of tokens x on a grid, s = C_in^(-1/2):
    p = 2x2 average pooling of x, an odd last row or column dropped            (M cells)
    a, b = W_p p + c_p, widths C_in / 4 and C_out / 4
    D = s/N sum_cells (SiLU(a) W_1)^T (SiLU(b) W_2)                            (C_in, C_out), N = H*W
    y = x (D / (|D| + 1) + W) + c                                              |.| of each column
DynCnn, 3x3 depthwise:
    K = W_4 GELU(W_3 p + c_3), p = x pooled to 3x3 cells, cell (i, j) of K being tap (i, j)
    y = x convolved with K / (|K| + 1) + W, and c                              |.| of each channel's taps
Block; every third one has both layers so, the others plain ones, W alone:
    x <- LN(x) in dynamic blocks: the norm replaces the residual stream
    x <- x + DynCnn(x);  x <- x + W_2 GELU(DynLinear(LN(x))) + c_2

A side of one token, where the published pooling has no cell, is pooled over that one. Prefix tokens go through
the linear layers with the weights of their image; they are in no pool and under no convolution. Of a padded batch
every image is pooled at its own size. Both sums over cells merge, so a block streams: first the convolution's round,
then the linear layer's, on tokens that have been through the convolution.
"""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Grid,
    Layout,
    Tile,
    accumulator,
    at_least,
    at_most,
    copied,
    divided,
    dynamic_depthwise_conv,
    full_precision,
    mask_tokens,
    pad_prefix,
    unflatten,
)

from ..block import Block
from ..capabilities import Capabilities, Structure
from ..checks import held
from ..core import Core
from ..parts.pooled import Pool
from ..parts.token_conv import TokenConv
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens


def _alone(x: Tensor) -> Tokens:
    """Tokens of a core that knows no queries, keys and values."""
    return Tokens(x, x, x)


def is_dynamic(index: int | None, every: int) -> bool:
    """True where the block `index` of a model is dynamic: the second of each `every`; a block alone is."""
    if every < 1:
        raise LinsightError(f"every={every}: pass 1 for dynamic blocks only, or n for one in n")
    return index is None or index % every == 1 % every


class CellProducts(Round):
    """D, of the cells of 2x2 tokens; a cell is absorbed where it begins, and reaches one token further."""

    def __init__(self) -> None:
        super().__init__(halo=1)

    def absorb(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """D, `(B, in, out)`, of the cells that begin in the tile."""
        x = tokens.q
        cells, inside, count = pool_pairs(x[:, tile.prefix :], tile)
        narrow = (core.w1.shape[0], core.w2.shape[0])
        a, b = F.silu(core.wfm(cells.to(x.dtype))).split(narrow, dim=-1)
        a, b = mask_tokens(a @ core.w1, inside), b @ core.w2  # a cell masked in one factor adds nothing
        dtype = accumulator(x.dtype)
        with full_precision(x):
            return torch.matmul(a.to(dtype).transpose(1, 2) * (x.shape[-1] ** -0.5 / count), b.to(dtype))

    def finish(self, core: Any, state: Tensor, done: Done) -> Tensor:
        """D / (|D| + 1)."""
        with full_precision(state):
            return state / (torch.linalg.vector_norm(state, dim=1, keepdim=True) + 1)


class KernelCells(Pool):
    """K, of the tokens pooled to 3x3 cells."""

    def finish(self, core: Any, state: Tensor, done: Done) -> Tensor:
        """K / (|K| + 1), `(B, C, 3, 3)`."""
        cells = copied(unflatten(state.to(core.w.dtype), 1, self.size).permute(0, 3, 1, 2))
        kernels = core.wfm(cells).to(state.dtype)
        with full_precision(state):
            return kernels / (torch.linalg.vector_norm(kernels, dim=(2, 3), keepdim=True) + 1)


class DynLinear(Core):
    """A linear layer with weights for each image, W + D(x). Of `tokens` it takes q, `(B, P + H*W, in)`.

    `w` is `(in, out)`, input first, as published. Padding must be zero.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (CellProducts(),)
    reduction = 4  # of the widths of a and b

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        inner = (in_features // self.reduction, out_features // self.reduction)
        self.w, self.b = table(in_features, out_features), table(out_features)
        self.w1, self.w2 = table(inner[0], in_features), table(inner[1], out_features)
        self.wfm = nn.Linear(in_features, sum(inner), device=device, dtype=dtype)
        for parameter in (self.w, self.b, self.w1, self.w2):
            nn.init.trunc_normal_(parameter, std=0.02)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """`(B, P + h*w, out)`."""
        return torch.matmul(tokens.q, self.w + done[0].to(self.w.dtype)) + self.b


class DynCnn(Core):
    """A 3x3 depthwise convolution with kernels for each image, W + K(x). Of `tokens` it takes q, `(B, P + H*W, C)`.

    Padding must be zero; at prefix tokens the outputs are.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (KernelCells((3, 3)),)
    halo = 1

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(dim, 1, 3, 3, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.wfm = nn.Sequential(
            nn.Conv2d(dim, dim, 1, device=device, dtype=dtype),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, bias=False, device=device, dtype=dtype),
        )
        for parameter in (self.w, self.b):
            nn.init.trunc_normal_(parameter, std=0.02)

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """`(B, P + h*w, C)`."""
        x = tokens.q[:, tile.prefix :]
        kernels = self.w[:, 0] + done[0].to(self.w.dtype)
        out = dynamic_depthwise_conv(x, tile.seen, kernels.to(x.dtype)) + self.b
        return pad_prefix(tile.inner_grid(out), tile.prefix)


class StaticCnn(TokenConv):
    """The plain 3x3 depthwise convolution, called as `DynCnn`."""

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """`(B, P + H*W, C)`; 0 at prefix tokens."""
        height, width, prefix = layout.grid
        return pad_prefix(super().forward(tokens.q[:, prefix:], (height, width)), prefix)


class StaticLinear(nn.Linear):
    """The plain linear layer, called as `DynLinear`."""

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """`(B, P + H*W, out)`."""
        return super().forward(tokens.q)


def pool_pairs(x: Tensor, tile: Tile) -> tuple[Tensor, Tensor | None, Tensor | int]:
    """Means over the cells of 2x2 tokens of a grid that begin in `tile`, of images of their own sizes if it has them.

    `x` `(B, h*w, C)`, what the tile sees with a halo of 1 where the grid goes on, without prefix tokens. Returns cells
    `(B, M, C)` in the accumulator's dtype, `(B, M)` bool where an image has them or None, and how many tokens an
    image has, H*W or `(B, 1, 1)`.
    """
    height, width, _ = tile.grid
    down, right = at_most(height, 2), at_most(width, 2)
    rows, columns, stride, start = height // down, width // right, tile.seen[1], 0
    above = before = 0  # cells of the grid that begin before those of the tile
    if not tile.is_whole:
        above, rows = _begin(tile.top, tile.height, down, rows)
        before, columns = _begin(tile.left, tile.width, right, columns)
        start = (above * down - tile.rows[0]) * stride + before * right - tile.columns[0]
    # Gathered, as slices of the grid would make a graph for each size of one cell, and are slower to differentiate.
    cell = torch.arange(rows * columns, device=x.device)[:, None, None]
    row, column = divided(cell, at_least(columns, 1))
    corner = start + row * (down * stride) + column * right
    inner = torch.arange(down, device=x.device)[:, None] * stride + torch.arange(right, device=x.device)
    tokens = unflatten(x.index_select(1, (corner + inner).flatten()), 1, (rows * columns, down * right))
    cells = tokens.mean(dim=2, dtype=accumulator(x.dtype))
    if tile.sizes is None:
        return cells, None, height * width
    sizes = tile.sizes.to(x.device)
    own = sizes.clamp(max=2)
    inside = Layout(Grid(rows, columns), sizes // own - sizes.new_tensor([above, before])).keep(x.device)
    share = down * right / own.prod(dim=1).to(cells.dtype)  # of a side of 1, padding is in the mean
    return cells * share[:, None, None], inside, sizes.prod(dim=1)[:, None, None]


def _begin(start: int, count: int, size: int, cells: int) -> tuple[int, int]:
    """The first of `cells` cells of `size` tokens along a side that begins in a span of tokens, and how many do."""
    first, end = -(-start // size), min(cells, -(-(start + count) // size))
    return first, max(0, end - first)


@register(
    "weightformer",
    kind="block",
    formula="x = LN(x); x + conv3x3(x; W + K(x)); x + W_2 GELU(LN(x) (W + D(x)))",
    latex=r"\begin{aligned} x &\leftarrow \mathrm{LN}(x) \cr "
    r"x &\leftarrow x + x \ast \left( W_{\mathrm{conv}} + \frac{K}{\lVert K \rVert + 1} \right) + c, \quad K = "
    r"W_4 \mathrm{GELU}(W_3 \mathrm{pool}_{3 \times 3}(x) + c_3) \cr "
    r"x &\leftarrow x + W_2 \mathrm{GELU}\left( \mathrm{LN}(x) \left( W + \frac{D}{\lVert D \rVert + 1} "
    r"\right) + c \right) + c_2, \quad D = \frac{s}{N} \sum_{\mathrm{cells}} (\mathrm{SiLU}(a) W_1)^\top "
    r"(\mathrm{SiLU}(b) W_2) \end{aligned}",
    family="inner weights",
    also=("WFM",),
    complexity="O(N d^2)",
    paper=Paper("Linear-Time Global Visual Modeling without Explicit Attention", "2605.01711"),
)
class WeightFormer(Block):
    """A convolution and an MLP whose weights are predicted from the image; `num_heads` has no effect.

    Args:
        every: one block in so many is dynamic, from the second; the others are plain. A block built alone is
            dynamic.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    structure = Structure(stream=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        index: int | None = None,
        every: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden, self.dim = int(dim * mlp_ratio), dim
        self.dynamic = is_dynamic(index, every)
        make_linear, make_conv = (DynLinear, DynCnn) if self.dynamic else (StaticLinear, StaticCnn)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype) if self.dynamic else nn.Identity()
        self.dwc = make_conv(dim, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.linear1 = make_linear(dim, hidden, device=device, dtype=dtype)
        self.linear2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path)

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The residual stream, which a dynamic block replaces by its norm."""
        inside = layout.keep(x.device)
        x = mask_tokens(self.norm1(mask_tokens(x, inside)), inside)
        x = x + self.dwc(_alone(x), layout)
        hidden = self.linear1(_alone(mask_tokens(self.norm2(x), inside)), layout)
        return x + self.drop_path(self.linear2(F.gelu(hidden)))

    def weight(self) -> Tensor | None:
        """See `Block`."""
        return held(self.linear2)

    def extra_repr(self) -> str:
        """Shown by `print(block)`."""
        return "dynamic" if self.dynamic else "static"
