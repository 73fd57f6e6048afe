"""HiLo: some heads attend inside small windows, for high frequencies, the others to averages of windows, for low ones.

Pan et al., "Fast Vision Transformers with HiLo Attention", NeurIPS 2022 (arXiv 2205.13213), by its published code. Of h
heads, floor(alpha h) are low. On a grid cut into windows of s x s tokens, with queries, keys and values that each group
of heads projects from all channels of x,

    high    o_i = W_h [sum_j softmax_j(d^(-1/2) q_i . k_j) v_j],   j in the window of i
    low     o_i = W_l [sum_a softmax_a(d^(-1/2) q_i . k_a) v_a],   k_a, v_a of the mean of x over the window a

and the outputs of the high heads, then those of the low ones, are the channels; there is no projection of both. With
s = 1 all heads are low and nothing is averaged, whatever alpha is: softmax attention. With no low heads no token sees
beyond its window. Few heads are cut roughly: with alpha = 0.9 two heads are one and one, and one head is a high one.

The cost of the low heads is O(N^2 / s^2), quadratic with a small factor. The published layer takes grids that s
divides, and the published backbones for dense tasks pad others with zeros, which are seen and averaged. Here windows at
the right and bottom are cut: a window holds the tokens that there are, and its mean is over these. Dropped tokens and
padding are left out alike, and each image of a padded batch has windows of its own. Prefix tokens, which are in no
window, are refused.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Grid,
    Layout,
    accumulator,
    attend,
    full_precision,
    mask_tokens,
    traced,
    unflatten,
)

from ..capabilities import Capabilities, Cost, Structure
from ..checks import held
from ..layer import Layer
from ..registry import Paper, register
from ..tokens import merge_heads, split_heads


class Windows:
    """A grid cut into windows of `side` x `side` tokens, row by row; the last ones may reach beyond it."""

    def __init__(self, grid: Grid, side: int) -> None:
        self.grid, self.side = grid, side
        # In a graph, whether they reach beyond must not be asked: an answer would hold for some sizes only. It holds
        # one window more a side, which is empty: it would ask whether there is only one.
        self.graph = traced(*grid)
        more = 2 * side - 1 if self.graph else side - 1  # of this form, multiples are known to be some
        self.counts = tuple((n + more) // side for n in grid[:2])
        self.beyond = self.graph or any(n % side for n in grid[:2])

    def cut(self, x: Tensor) -> Tensor:
        """`(B, H*W, ...)` -> `(B, windows, side * side, ...)`, zeros where a window reaches beyond the grid."""
        x = unflatten(x, 1, self.grid[:2])
        if self.beyond:
            low, right = (count * self.side - n for count, n in zip(self.counts, self.grid, strict=False))
            x = F.pad(x, (*[0, 0] * (x.ndim - 3), 0, right, 0, low))
        x = unflatten(unflatten(x, 2, (self.counts[1], self.side)), 1, (self.counts[0], self.side))
        return _laid_out(x.transpose(2, 3)).flatten(3, 4).flatten(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """`(B, windows, side * side, C)` -> `(B, H*W, C)`."""
        x = unflatten(unflatten(x, 1, self.counts), 3, (self.side, self.side))
        x = _laid_out(x.transpose(2, 3)).flatten(3, 4).flatten(1, 2)  # (B, rows, columns, C)
        for axis, n in zip((1, 2), self.grid[:2], strict=True):
            if self.graph:  # not by a slice: a graph would ask whether it is all there is
                x = x.index_select(axis, torch.arange(n, device=x.device))
            elif self.beyond:
                x = x.narrow(axis, 0, n)
        return x.flatten(1, 2)

    def seen(self, x: Tensor, keep: Tensor | None) -> Tensor | None:
        """`(B or 1, windows, side * side)` bool, False where there is no token that is kept; None where all are."""
        if keep is None and not self.beyond:
            return None
        inside = x.new_ones(1, x.shape[1]) if keep is None else keep.to(x.dtype)
        return self.cut(inside[..., None])[..., 0] > 0  # in floating point: exporters pad no bool


def _laid_out(x: Tensor) -> Tensor:
    """A dense copy, as flattening would make one; how it lies then does not depend on whether there was padding."""
    return x.clone(memory_format=torch.contiguous_format)


@register(
    "hilo",
    kind="layer",
    formula="o = [W_h softmax(q_h K_w^T) V_w, W_l softmax(q_l K_m^T) V_m], w the window of a token, m the means of all",
    latex=r"o = \left[ W_h \mathrm{softmax}(s q_h K_w^\top) V_w, W_l \mathrm{softmax}(s q_l K_m^\top) V_m \right], "
    r"\quad K_w \text{ of the window}, K_m \text{ of the means of windows}",
    family="window",
    also=("LITv2",),
    complexity="O(N s^2 d + N^2 d / s^2)",
    paper=Paper("Fast Vision Transformers with HiLo Attention", "2205.13213", "NeurIPS 2022"),
)
class HiLo(Layer):
    """Attention in windows by some heads, and to the means of windows by the others.

    Args:
        window_size: s, the side of a window in tokens; 1 for softmax attention.
        alpha: the share of the heads that are low, rounded down, from 0 to 1.
        qkv_bias: of what makes queries, keys and values.
        proj_bias: of the output projections.
        proj_drop: rate of dropout behind them.
    """

    capabilities = Capabilities(keep=True, sizes=True)
    structure = Structure(cost=Cost.QUADRATIC)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 2,
        alpha: float = 0.9,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if window_size < 1:
            raise LinsightError(f"window_size={window_size} of 'hilo' is a side in tokens: 1 or more, published 1, 2")
        if not 0 <= alpha <= 1:
            raise LinsightError(f"alpha={alpha} of 'hilo' is a share of the heads: it must be from 0 to 1")
        self.dim, self.num_heads, self.window_size = dim, num_heads, window_size
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        if not self.low_heads:
            self.structure = self.structure._replace(cost=Cost.WINDOWED)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        low = self.low_heads * (dim // num_heads)
        high = dim - low
        if low:
            self.l_q = nn.Linear(dim, low, bias=qkv_bias, **factory)
            self.l_kv = nn.Linear(dim, 2 * low, bias=qkv_bias, **factory)
            self.l_proj = nn.Linear(low, low, bias=proj_bias, **factory)
        if high:
            self.h_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias, **factory)
            self.h_proj = nn.Linear(high, high, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The tokens `(B, H*W, C)`, mixed."""
        inside = layout.keep(x.device)
        if inside is not None:
            keep = inside if keep is None else keep & inside
        x = mask_tokens(x, keep)
        if self.window_size == 1:
            return self.proj_drop(self.low(x, x, None if keep is None else keep[:, None, None]))
        windows = Windows(layout.grid, self.window_size)
        cells, seen = windows.cut(x), windows.seen(x, keep)
        outs = [windows.join(self.high(cells, seen))] if self.high_heads else []
        if self.low_heads:
            outs.append(self.low(x, *means(cells, seen)))
        return self.proj_drop(torch.cat(outs, dim=-1))

    def weight(self) -> Tensor | None:
        """See `Layer`."""
        return held(self.l_proj if self.low_heads else self.h_proj)

    def high(self, cells: Tensor, seen: Tensor | None) -> Tensor:
        """The high heads' output `(B, windows, s * s, C_h)`, of the tokens of windows, alike.

        By products, in the accumulator's dtype: kernels for long sequences are slow on so many of a few tokens.
        """
        qkv = unflatten(self.h_qkv(cells), -1, (3, self.high_heads, self.dim // self.num_heads))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).to(accumulator(qkv.dtype)).unbind(0)  # (B, windows, heads, s * s, d)
        with full_precision(q):
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
            if seen is not None:
                scores = scores.masked_fill(~seen[:, :, None, None], torch.finfo(scores.dtype).min)
            out = scores.softmax(dim=-1) @ v
        return self.h_proj(merge_heads(out.transpose(2, 3)).to(qkv.dtype))

    def low(self, x: Tensor, coarse: Tensor, seen: Tensor | None) -> Tensor:
        """The low heads' output `(B, N, C_l)`, of all tokens and the means of windows `(B, windows, C)`.

        seen: `(B or 1, 1, 1, windows)`, False where a window has no token.
        """
        parts = (self.l_q(x), *self.l_kv(coarse).chunk(2, dim=-1))
        q, k, v = (split_heads(part, self.low_heads).transpose(1, 2) for part in parts)
        return self.l_proj(merge_heads(attend(q, k, v, seen).transpose(1, 2)))

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"high_heads={self.high_heads}, low_heads={self.low_heads}, window_size={self.window_size}"


def means(cells: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The mean of the seen tokens of each window of `(B, windows, s * s, C)`, and the windows that have some.

    cells: zero where there is none.
    """
    wide = cells.to(accumulator(cells.dtype))
    if seen is None:
        return wide.mean(dim=2).to(cells.dtype), None
    count = seen.to(wide.dtype).sum(dim=2)
    mean = wide.sum(dim=2) / count.clamp(min=1)[..., None]
    return mean.to(cells.dtype), (count > 0)[:, None, None]
