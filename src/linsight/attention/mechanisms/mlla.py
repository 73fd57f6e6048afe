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

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import Features, Layout, Tile, Turn, accumulator, check_rotary, each_grid, mask_tokens

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..layer import Attention
from ..parts.kernel import KernelCore, KernelMeans
from ..parts.token_conv import TokenConv, convolved_values
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens


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
        self.dwc = TokenConv(dim, **factory)
        self.act_proj = nn.Linear(dim, dim, **factory)

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """Queries, keys and values of the branch that is convolved; dropped tokens are as outside the grid there."""
        u = each_grid(self._convolved, mask_tokens(self.in_proj(x), keep), layout)
        return super().tokens(u, u, layout, keep)

    def conclude(self, out: Tensor, x: Tensor) -> Tensor:
        """Gated by the other branch, and projected."""
        return super().conclude(out * F.silu(self.act_proj(x)), x)

    def _convolved(self, u: Tensor, layout: Layout) -> Tensor:
        grid = layout.grid
        local = self.dwc(u[:, grid.prefix :], (grid.height, grid.width))
        return F.silu(torch.cat([u[:, : grid.prefix], local], dim=1) if grid.prefix else local)


@register(
    "mlla",
    formula="o_i = rot(f(q_i)) mean(rot(f(k)) v^T) / (f(q_i) . mean(f(k)) + eps) + conv3x3(v), f = elu + 1; gated",
    latex=r"\begin{aligned} o_i &= \frac{\mathrm{rot}(f(q_i)) \mathrm{mean}(\mathrm{rot}(f(k)) v^\top)}{f(q_i) \cdot "
    r"\mathrm{mean}(f(k)) + 10^{-6}} + \mathrm{conv}_{3 \times 3}(v)_i, \quad f = \mathrm{elu} + 1 \cr "
    r"y &= \mathrm{proj}(o(u) \odot \mathrm{SiLU}(\mathrm{act}(x))), \quad u = \mathrm{SiLU}(\mathrm{conv}_{3 "
    r"\times 3}(\mathrm{in}(x))) \end{aligned}",
    family="feature map",
    also=("MILA",),
    complexity="O(N d^2)",
    paper=Paper("Demystify Mamba in Vision: A Linear Attention Perspective", "2405.16605", "NeurIPS 2024"),
)
class MLLA(KernelCore):
    """Linear attention with a rotary embedding and a convolution of v; `layer` puts it between convolution and gate."""

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    rounds = (KernelMeans(),)
    halo = 1
    turn = Turn
    projections = "qk"
    layer = GatedAttention
    published = (Rename("lepe.", "core.lepe."), Rename("out_proj.", "proj."))

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
        self.lepe = TokenConv(dim, device=device, dtype=dtype)

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """f, and the rotation that only products with values see."""
        channels = x.shape[-2] * x.shape[-1]
        turn = self.turn.of(tile, channels, device=x.device, dtype=accumulator(x.dtype))
        return Features(x, "elu+1", turn=turn)

    def local(self, tokens: Tokens, tile: Tile) -> Tensor:
        """conv(v)."""
        return convolved_values(self.lepe, tokens, tile)
