"""MLLA attention: rotary linear attention in a gated layer, after Mamba's block (called MILA in the final paper).

Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective", NeurIPS 2024 (arXiv 2405.16605).
With f = elu + 1 on all channels, rot the rotary embedding of a token's place over all channels (see
`linsight.ops.rotary`), then the split into heads, and means over the N tokens:

    o_i = rot(f(q_i)) mean(rot(f(k)) v^T) / (f(q_i) . mean(f(k)) + 1e-6) + conv3x3(v)

Only the numerator is rotated, so weights may be negative and do not sum to 1. v is the layer's input itself. In the
gated layer that input is u, and its output is gated:

    u = SiLU(conv3x3(in_proj(x))),   y = proj(o(u) * SiLU(act_proj(x)))

Both convolutions are depthwise. Prefix tokens have no place on the grid: they are not rotated and pass both by.
The published code rotates complex numbers, which fails in half precision; here everything is real.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import (
    Features,
    Grid,
    Layout,
    LinearState,
    State,
    Tile,
    Turn,
    accumulator,
    check_rotary,
    count_tokens,
    depthwise_conv,
    each_grid,
    linear_absorb,
    linear_read,
    mask_tokens,
    unrecorded,
)

from ..core import Capabilities, Core, Rename, Tokens
from ..layer import Attention
from ..parts.token_conv import grid_values, local_values, on_grid
from ..registry import Paper, register


class GatedAttention(Attention):
    """A core between a convolution and a gate: both branches start from the layer's input."""

    def __init__(
        self,
        core: Core,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: Any,
    ) -> None:
        super().__init__(core, dim, device=device, dtype=dtype, **layer)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, dim, **factory)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.act_proj = nn.Linear(dim, dim, **factory)

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """Queries, keys and values of the branch that is convolved; dropped tokens are as outside the grid there."""
        u = each_grid(self._convolved, mask_tokens(self.in_proj(x), keep), layout)
        return super().tokens(u, u, layout, keep)

    def conclude(self, out: Tensor, x: Tensor) -> Tensor:
        """Gated by the other branch, and projected."""
        gate = self.act_proj(x)
        return super().conclude(F.silu(gate).mul_(out) if unrecorded() else out * F.silu(gate), x)

    def _convolved(self, u: Tensor, layout: Layout) -> Tensor:
        grid = layout.grid
        local = depthwise_conv(u[:, grid.prefix :], (grid.height, grid.width), self.dwc.weight, self.dwc.bias)
        return F.silu(torch.cat([u[:, : grid.prefix], local], dim=1) if grid.prefix else local, inplace=unrecorded())


class MLLAState(NamedTuple):
    """kv: `(B, H, D, E)` sum rot(f(k)) v^T.  k: `(B, H, D)` sum f(k).  count: `(B,)` tokens."""

    kv: Tensor
    k: Tensor
    count: Tensor  # type: ignore[assignment]  # also a method of tuples


@register(
    "mlla",
    formula="o_i = rot(f(q_i)) mean(rot(f(k)) v^T) / (f(q_i) . mean(f(k)) + eps) + conv3x3(v), f = elu + 1; gated",
    complexity="O(N d^2)",
    paper=Paper("Demystify Mamba in Vision: A Linear Attention Perspective", "2405.16605", "NeurIPS 2024"),
)
class MLLA(Core):
    """Linear attention with a rotary embedding and a convolution of v; `layer` puts it between convolution and gate."""

    capabilities = Capabilities(keep=True, sizes=True, stream=True, prefix=True)
    halos = (0, 1)
    projections = "qk"
    layer = GatedAttention
    published = (Rename("lepe.", "core.lepe."), Rename("out_proj.", "proj."))
    eps = 1e-6

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rotary(dim)
        self.num_heads = num_heads
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> MLLAState:
        """The sums over the tile's tokens, and how many there are."""
        sums = linear_absorb(self._features(tokens.k, tile), tokens.v, tokens.keep)
        return MLLAState(sums.kv, sums.k, count_tokens(tokens.v, tokens.keep))

    def finish(self, r: int, state: MLLAState, grid: Grid) -> LinearState:
        """The means over the tokens."""
        share = 1 / state.count.clamp(min=1)[:, None, None]
        return LinearState(state.kv * share[..., None], state.k * share)

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """f(q), rotated above the line only, against the means; and the convolution of v."""
        state: LinearState = done[0]
        q = self._features(tile.inner(tokens.q), dataclasses.replace(tile, halo=0))
        local = on_grid(local_values(grid_values(tokens, tile), self.lepe, tile, self.num_heads), tile)
        return linear_read(q, state, self.eps, add=local, dtype=tokens.q.dtype)

    def _features(self, x: Tensor, tile: Tile) -> Features:
        channels = x.shape[-2] * x.shape[-1]
        turn = Turn.of(tile, channels, device=x.device, dtype=accumulator(x.dtype))
        return Features(x, "elu+1", turn=turn)
