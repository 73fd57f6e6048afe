"""Large kernel attention: tokens gated by two depthwise convolutions of them, which together see 23 x 23 tokens.

Guo et al., "Visual Attention Network", Computational Visual Media 2023 (arXiv 2202.09741). The core, for tokens u,

    LKA(u) = u * W(dwconv7x7 of dilation 3(dwconv5x5(u)))

without a softmax and without heads; the layer around it adds its input: x + P_2 LKA(GELU(P_1 x)). It is a fixed
context: a token sees the 11 tokens on each side and no others.

Tokens that are dropped, and padding, are to both convolutions as what lies outside of the grid. Prefix tokens, which
have no place in a convolution, are refused.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.ops import Layout, Tile, accumulator, full_precision, mask_tokens

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..layer import Attention
from ..parts.token_conv import TokenConv, grid_values
from ..parts.wide import WideLinear
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens, split_heads


class LKALayer(Attention):
    """The layer around the core: GELU behind its first projection, and its input added to the output."""

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """The projected tokens, activated."""
        found = super().tokens(x, source, layout, keep)
        return found._replace(v=F.gelu(found.v))

    def conclude(self, out: Tensor, x: Tensor) -> Tensor:
        """x + P_2 of what the core gives."""
        return x + super().conclude(out, x)


@register(
    "lka",
    formula="x + P_2 (u * W dwconv7x7_dilated(dwconv5x5(u))), u = GELU(P_1 x)",
    latex=r"x + P_2 \left( u \odot W  \mathrm{conv}_{7 \times 7, 3}(\mathrm{conv}_{5 \times 5}(u)) \right), \quad "
    r"u = \mathrm{GELU}(P_1 x)",
    family="convolution",
    also=("VAN",),
    complexity="O(N d^2)",
    paper=Paper("Visual Attention Network", "2202.09741", "Computational Visual Media 2023"),
)
class LKA(Core):
    """A gate of two depthwise convolutions; heads have no effect."""

    capabilities = Capabilities(keep=True, sizes=True)
    structure = Structure(stream=True)
    projections = "v"
    layer = LKALayer
    published = (
        Rename("proj_1.", "v.", ones=2),
        Rename("proj_2.", "proj.", ones=2),
        Rename("spatial_gating_unit.", "core."),
        Rename("spatial_gating_unit.conv1.", "core.conv1.", ones=2),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv0 = TokenConv(dim, 5, **factory)
        self.conv_spatial = TokenConv(dim, 7, dilation=3, **factory)
        self.conv1 = WideLinear(dim, dim, **factory)
        self.halo = 2 + 9

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """u times its gate, computed in the accumulator's dtype."""
        u = grid_values(tokens, tile)
        gate = mask_tokens(self.conv0(u, tile.seen, wide=True), tokens.keep)
        gate = tile.inner_grid(self.conv_spatial(gate, tile.seen, wide=True))
        with full_precision(u):
            out = tile.inner_grid(u).to(accumulator(u.dtype)) * self.conv1(gate)
        return split_heads(out.to(u.dtype), self.num_heads)
