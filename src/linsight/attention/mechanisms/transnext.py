"""TransNeXt: cosine attention with a temperature that grows with the number of keys, to a window and a pooled grid.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024 (arXiv 2311.17132), by the
published code of MoH (Jin et al., arXiv 2410.11842), whose gates of heads are an option. Per head, with q^ = q / |q|,
k^ = k / |k|, a learned vector e and temperature t, and a bias b that an MLP makes of the distance of query and key,

    q'_i = (q^_i + e) softplus(t) log(n_i),   n_i the number of keys of i

    sr_ratio 1   o_i = sum_j softmax_j(q'_i . k^_j + b_ij) v_j                   over all tokens
    else         a_i = softmax([q'_i . k^_j + b_j, q'_i . k^_p + b_ip])          over the 3x3 tokens j around i, of the
                 o_i = sum_j (a_ij + q^_i . t_j + c_j) v_j + sum_p a_ip v_p      grid, and all tokens p of a coarser one

with a bias b_j, a token t_j and a number c_j of each place of the window. Tokens of the coarser grid are
LN(pool(GELU(W x))), adaptive averages, from which the same projection makes keys and values.

Distances are counted in sides of `grid`, which weights are trained on: without `grid` there is no bias of the distance.
The published code is built for one grid; here n_i and the pooled grid are those of the image, and a side shorter than
sr_ratio has one cell. Prefix tokens have no place on the grid, and pooled cells of an image in padding would be others,
so both are refused, as is dropping tokens. Scores are computed in float32 (float64 for float64).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Grid,
    Layout,
    accumulator,
    at_least,
    attend,
    count_tokens,
    full_precision,
    pool_matrix,
    separable,
    unflatten,
)

from ..capabilities import Capabilities, Cost, Structure
from ..checks import held
from ..core import Rename
from ..layer import Layer
from ..parts.head_gates import HeadGates
from ..parts.log_distance import LogDistance
from ..registry import Paper, register
from ..tokens import merge_heads, split_heads

_SIDE = 3  # of the window
_PLACES = _SIDE * _SIDE
_TEMPERATURE = 1 / 0.24  # softplus(t) at the start


@register(
    "transnext",
    kind="layer",
    formula="o_i = sum_j (a_ij + q^_i . t_j + c_j) v_j + sum_p a_ip v_p, a_i the softmax over 3 x 3 tokens j and all "
    "pooled tokens p of (q^_i + e) softplus(t) log(n_i) . k^ + b",
    latex=r"o_i = \sum_{j \in w(i)} (a_{ij} + \hat q_i \cdot t_j + c_j) v_j + \sum_p a_{ip} v_p, \quad "
    r"a_i = \mathrm{softmax} \left( (\hat q_i + e) \mathrm{softplus}(\tau) \log n_i \cdot \hat k + b \right)",
    family="scores",
    complexity="O(N^2 d / s^2 + 9 N d)",
    paper=Paper("TransNeXt: Robust Foveal Visual Perception for Vision Transformers", "2311.17132", "CVPR 2024"),
)
class TransNeXt(Layer):
    """Cosine attention to all tokens, or to a window and a coarser grid, perhaps with gates of heads.

    Args:
        sr_ratio: s, by how much the grid of pooled keys is coarser; with 1 all tokens are keys, and there is no window.
        shared_heads: S of MoH's gates, heads that every token has; None for a quarter of them, or for no gates where
            `routed_heads` is None, too.
        routed_heads: R, heads that a token keeps of the others; None for half of these.
        qkv_bias: of what makes queries, keys and values.
        proj_bias: of the output projection.
        proj_drop: rate of dropout behind it.
    """

    capabilities = Capabilities()
    structure = Structure(cost=Cost.QUADRATIC)
    published = (
        Rename("sr.", "sr.", ones=2),
        Rename("cpb_", "distance."),
        Rename("wg", "gates.wg"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sr_ratio: int = 1,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        grid: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if sr_ratio < 1:
            raise LinsightError(f"sr_ratio={sr_ratio} of 'transnext' must be 1 or more")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim // num_heads
        self.dim, self.num_heads, self.sr_ratio = dim, num_heads, sr_ratio
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(_TEMPERATURE)), **factory))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, width, **factory))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        if sr_ratio == 1:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
            self.sr = nn.Linear(dim, dim, **factory)
            self.norm = nn.LayerNorm(dim, **factory)
            self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, _PLACES, **factory))
            self.learnable_tokens = nn.Parameter(torch.empty(num_heads, width, _PLACES, **factory))
            self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, _PLACES, **factory))
            nn.init.trunc_normal_(self.relative_pos_bias_local, std=4e-4)
            nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        self.init_weights()
        self.distance = None if grid is None else LogDistance(num_heads, (grid[0], grid[1]), **factory)
        self.gates: HeadGates | None = None
        if shared_heads is not None or routed_heads is not None:
            self.gates = HeadGates(dim, num_heads, shared_heads, routed_heads, owner="transnext", **factory)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The tokens `(B, H*W, C)`, mixed."""
        out = (self.read_all if self.sr_ratio == 1 else self.read_window)(x, layout.grid)
        if self.gates is not None:
            out = self.gates(out, x)
        return self.proj_drop(self.proj(merge_heads(out).to(x.dtype)))

    def weight(self) -> Tensor | None:
        """See `Layer`."""
        return held(self.proj)

    def read_all(self, x: Tensor, grid: Grid) -> Tensor:
        """Attention to all tokens: `(B, N, H, d)`, in the accumulator's dtype."""
        q, k, v = (self.wide(part) for part in self.qkv(x).chunk(3, dim=-1))
        q = self.sharpened(unit(q), count_tokens(x, None)[:, None])
        bias = None if self.distance is None else self.distance(x, grid[:2])[None]
        with full_precision(x):
            out = attend(q.transpose(1, 2), unit(k).transpose(1, 2), v.transpose(1, 2), bias, scale=1.0)
        return out.transpose(1, 2)

    def read_window(self, x: Tensor, grid: Grid) -> Tensor:
        """Attention to the window and the pooled tokens: `(B, N, H, d)`, in the accumulator's dtype."""
        height, width, _ = grid
        cells: tuple[Any, Any] = (at_least(height // self.sr_ratio, 1), at_least(width // self.sr_ratio, 1))
        q = unit(self.wide(self.q(x)))
        k, v = (self.wide(part) for part in self.kv(x).chunk(2, dim=-1))
        far_k, far_v = (self.wide(part) for part in self.kv(self.pooled(x, grid, cells)).chunk(2, dim=-1))
        k, far_k = unit(k), unit(far_k).transpose(1, 2)
        inside = torch.cat(neighbours(torch.ones_like(q[:1, :, :1, :1]), grid), dim=-1)[0, :, 0]  # (N, 9)
        tokens, single, local = (
            part.to(q.dtype) for part in (self.learnable_tokens, self.learnable_bias, self.relative_pos_bias_local)
        )
        with full_precision(x):
            sharp = self.sharpened(q, inside.sum(dim=-1)[None] + far_k.shape[2])
            near = torch.stack([(sharp * shifted).sum(dim=-1) for shifted in neighbours(k, grid)], dim=-1)
            near = (near + local).masked_fill(inside[:, None] == 0, float("-inf")).transpose(1, 2)  # (B, H, N, 9)
            far = sharp.transpose(1, 2) @ far_k.transpose(-2, -1)
            if self.distance is not None:
                far = far + self.distance(x, (height, width), cells)
            weights = torch.cat([near, far], dim=-1).softmax(dim=-1)
            near, far = weights[..., :_PLACES], weights[..., _PLACES:]
            near = (near + q.transpose(1, 2) @ tokens + single).transpose(1, 2)  # (B, N, H, 9)
            out = (far @ far_v.transpose(1, 2)).transpose(1, 2)
            for place, shifted in enumerate(neighbours(v, grid)):
                out = out + near[..., place : place + 1] * shifted
        return out

    def pooled(self, x: Tensor, grid: Grid, cells: tuple[Any, ...]) -> Tensor:
        """The tokens `(B, h*w, C)` of the coarser grid of `cells`."""
        z = F.gelu(self.sr(x))
        rows, columns = (
            pool_matrix(side, count, device=x.device, dtype=accumulator(x.dtype))
            for side, count in zip(grid[:2], cells, strict=True)
        )
        z = separable(unflatten(z.to(rows.dtype), 1, grid[:2]), rows, columns).flatten(1, 2)
        return self.norm(z.to(x.dtype))

    def sharpened(self, q: Tensor, keys: Tensor) -> Tensor:
        """q', of normed queries `(B, N, H, d)` and their number of keys `(B or 1, N or 1)`."""
        scale = F.softplus(self.temperature.to(q.dtype)) * keys.to(q.dtype).log()[:, None, :, None]  # (B, H, N, 1)
        return (q + self.query_embedding.to(q.dtype)[:, 0]) * scale.transpose(1, 2)

    def wide(self, x: Tensor) -> Tensor:
        """Heads `(B, N, H, d)` of tokens, in the accumulator's dtype."""
        return split_heads(x.to(accumulator(x.dtype)), self.num_heads)

    def init_weights(self) -> None:
        """The published start of the map of tokens that are pooled, which is a convolution there."""
        if self.sr_ratio > 1:
            nn.init.kaiming_normal_(self.sr.weight, mode="fan_out")

    def no_weight_decay(self) -> set[str]:
        """Temperature, query embedding and biases, as published."""
        names = {"temperature", "query_embedding"}
        if self.sr_ratio > 1:
            names.add("relative_pos_bias_local")
        return names | {f"distance.{name}" for name, _ in self.distance.named_parameters()} if self.distance else names

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"num_heads={self.num_heads}, sr_ratio={self.sr_ratio}"


def unit(x: Tensor) -> Tensor:
    """`x` `(..., d)` over its norm."""
    return F.normalize(x, dim=-1)


def neighbours(x: Tensor, grid: Grid) -> list[Tensor]:
    """The tokens of `x` `(B, N, H, d)` at each place of the window around, row by row; zeros outside of the grid."""
    height, width, _ = grid
    canvas = unflatten(x, 1, (height, width))
    canvas = F.pad(canvas, (0, 0, 0, 0, 1, 1, 1, 1))
    return [
        canvas[:, down : down + height, across : across + width].flatten(1, 2)
        for down in range(_SIDE)
        for across in range(_SIDE)
    ]
