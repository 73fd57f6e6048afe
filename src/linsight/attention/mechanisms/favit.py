"""FaViT: one head on a coarser grid of all keys, and heads on 7 x 7 keys that whole grids are factorised into.

Qin et al., "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost", IEEE TNNLS 2023
(arXiv 2312.08614), by its published code. The channels are cut into a global group and, for each dilation of (1, sr),
or of 1 alone with sr = 1, a local one; an eighth of them is global, and each local group has a multiple of the heads.

Global, one head: keys and values of LN(conv x), a convolution of kernel and stride sr, with v + conv3x3(v).
Local, for a dilation r, of kv = W conv3x3(x):
    windows   the grid continued by reflection to a multiple of 6 r + 1, in windows of 7 x 7 tokens that lie r apart
    factors   for each of the 49 places and each head of c channels, the n windows of c numbers in one row of n c, of
              which n neighbours each are averaged: window after window, so channels are mixed, as published
    keys      k, v = W_2 (W_1 of them), v + conv3x3(v) on the 7 x 7 grid; every query reads these 49

The published reflection needs sides of more than half a window; here it goes back and forth on any. Prefix tokens have
no place on the grid, and windows of an image in padding would be others, so both are refused, as is dropping tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import (
    Grid,
    Layout,
    accumulator,
    attend,
    divided,
    full_precision,
    pool_matrix,
    unflatten,
)

from ..capabilities import Capabilities, Cost, Structure
from ..checks import held
from ..core import Rename
from ..layer import Layer
from ..parts.reduction import Reduction
from ..parts.token_conv import TokenConv
from ..registry import Paper, register
from ..tokens import merge_heads, split_heads

_SIDE = 7  # of the windows
_CELLS = _SIDE * _SIDE


@register(
    "favit",
    kind="layer",
    formula="o = [softmax(q_g K_g^T) V_g, softmax(q_r K_r^T) V_r, ...], K_g of a coarser grid, K_r of 7 x 7 averages "
    "of windows with dilation r",
    latex=r"o = \left[ \mathrm{softmax}(s q_g K_g^\top) V_g, \mathrm{softmax}(s q_r K_r^\top) V_r, \ldots \right], "
    r"\quad K_g \text{ of a coarser grid}, K_r \text{ of } 7 \times 7 \text{ averages of dilated windows}",
    family="window",
    complexity="O(N^2 d / (8 s^2) + 49 N d)",
    paper=Paper("Factorization Vision Transformer", "2312.08614", "IEEE TNNLS 2023"),
)
class FaViT(Layer):
    """Factorisation self-attention.

    Args:
        sr_ratio: by how much the grid of the global head is coarser, and the dilation of the second local group; with 1
            there is one local group.
        qkv_bias: of what makes queries, keys and values.
        proj_bias: of the output projection.
        proj_drop: rate of dropout behind it.
    """

    capabilities = Capabilities()
    structure = Structure(cost=Cost.WINDOWED)  # the grid of the global head is coarser by its own ratio, not a host's
    published = (
        Rename("sr.", "reduction.sr."),
        Rename("norm.", "reduction.norm."),
        Rename("kv_l.point_conv.", "kv_l.point_conv.", ones=2),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if sr_ratio < 1:
            raise LinsightError(f"sr_ratio={sr_ratio} of 'favit' must be 1 or more")
        self.dilations = (1, sr_ratio) if sr_ratio > 1 else (1,)
        groups = len(self.dilations)
        local = 7 * dim // (8 * groups) // num_heads * num_heads
        if not local:
            raise LinsightError(
                f"dim={dim} of 'favit' has {groups} local groups of {num_heads} heads in 7/8 of it: take fewer heads"
            )
        self.dim, self.num_heads, self.local = dim, num_heads, local
        self.wide = wide = dim - groups * local  # of the global group
        width = local // num_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv_g = nn.Linear(wide, 2 * wide, bias=qkv_bias, **factory)
        self.reduction = Reduction(wide, sr_ratio, **factory)
        self.local_conv_g = TokenConv(wide, **factory)
        rest = dim - wide
        self.kv_l = nn.ModuleDict(
            {"depth_conv": TokenConv(rest, **factory), "point_conv": nn.Linear(rest, rest, **factory)}
        )
        self.fcs = nn.ModuleList(nn.Linear(width, width, **factory) for _ in self.dilations)
        self.single_heads = nn.ModuleList(nn.Linear(width, 2 * width, bias=qkv_bias, **factory) for _ in self.dilations)
        self.local_convs = nn.ModuleList(TokenConv(local, **factory) for _ in self.dilations)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """The published start of the map of local channels, which is a convolution there."""
        point: Any = self.kv_l["point_conv"]
        nn.init.kaiming_normal_(point.weight, mode="fan_out")

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The tokens `(B, H*W, C)`, mixed."""
        grid = layout.grid
        q_wide, q = self.q(x).split([self.wide, self.dim - self.wide], dim=-1)
        q = split_heads(q, self.num_heads).transpose(1, 2)
        width = self.local // self.num_heads
        kv = self.kv_l["depth_conv"](x[..., self.wide :], grid[:2])
        kv = self.kv_l["point_conv"](kv)
        outs = [self.read_all(q_wide, x[..., : self.wide], grid)]
        for i, part in enumerate(kv.split(self.local, dim=-1)):
            k, v = self.factors(i, part, grid)
            out = attend(q[..., i * width : (i + 1) * width], k, v)
            outs.append(merge_heads(out.transpose(1, 2)))
        return self.proj_drop(self.proj(torch.cat(outs, dim=-1)))

    def weight(self) -> Tensor | None:
        """See `Layer`."""
        return held(self.proj)

    def read_all(self, q: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """The global head's output `(B, N, C_g)`, of its queries and its channels of the input."""
        x, coarse = self.reduction(x, grid)
        k, v = self.kv_g(x).chunk(2, dim=-1)
        v = v + self.local_conv_g(v, coarse[:2])
        return attend(*(part[:, None] for part in (q, k, v)))[:, 0]

    def factors(self, i: int, kv: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, H, 49, c)` of the local group `i`, of its channels of the grid's tokens."""
        places = windows(grid, self.dilations[i], kv.device)
        given, dtype, width = kv.dtype, accumulator(kv.dtype), self.local // self.num_heads
        kv = split_heads(kv.index_select(1, places), self.num_heads).transpose(1, 2).flatten(2).to(dtype)
        row = places.shape[0] // _CELLS * width  # windows and their channels
        averages = pool_matrix(row, width, device=kv.device, dtype=dtype).T
        with full_precision(kv):
            kv = (unflatten(kv, 2, (_CELLS, row)) @ averages).to(given)  # (B, H, 49, c)
        k, v = self.single_heads[i](self.fcs[i](kv)).chunk(2, dim=-1)
        local = self.local_convs[i](merge_heads(v.transpose(1, 2)), (_SIDE, _SIDE))
        return k, v + split_heads(local, self.num_heads).transpose(1, 2)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"num_heads={self.num_heads}, dilations={self.dilations}"


def windows(grid: Grid, dilation: int, device: torch.device) -> Tensor:
    """The tokens of all windows, as indices into the grid row by row, reflected where it ends.

    `(49 * windows,)`, place after place of the windows: a graph must not ask whether there is one window only.
    """
    stride = (_SIDE - 1) * dilation + 1
    down, across = ((side + stride - 1) // stride for side in grid[:2])  # ONNX divides negative numbers another way
    cell, window = divided(torch.arange(_CELLS * (down * across), device=device), down * across)
    corner, place = divided(window, across), divided(cell, _SIDE)
    row, column = (reflected(c * stride + dilation * p, side) for c, p, side in zip(corner, place, grid, strict=False))
    return row * grid.width + column


def reflected(place: Tensor, side: Any) -> Tensor:
    """Places of a side that goes back and forth: of four 0 1 2 3 2 1 0 1 ..."""
    last = torch.zeros_like(place) + (side - 1)  # a tensor: exporters take it that no side is 1
    _, place = divided(place, (2 * last).clamp(min=1))
    return last - (place - last).abs()
