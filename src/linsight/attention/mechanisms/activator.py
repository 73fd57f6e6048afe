"""Activator: blocks of gated units in the place of attention, in which every token is by itself.

Abdullah et al., "Activator: GLU Activation Function as the Core Component of a Vision Transformer" (arXiv 2405.15953),
by its published code:

    unit(x) = W_3 (LN_h(GELU(W_1 x)) * LN_h(W_2 x)),   one LN_h for both
    x <- x + unit(LN(x))
    x <- x + MLP(LN(x)),                               by the same LN, or not at all

Nothing here mixes tokens, as published: what they know of each other comes of the host, as of its convolutions, its
patches and its mean. That makes it the control of comparisons of blocks: what mixing is worth is the distance to it.
"""

from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import Layout, mask_tokens

from ..block import Block
from ..capabilities import Capabilities
from ..checks import held
from ..registry import Paper, register


class GatedUnit(nn.Module):
    """W_3 (LN(GELU(W_1 x)) * LN(W_2 x))."""

    def __init__(self, dim: int, hidden: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(dim, hidden, **factory)
        self.norm = nn.LayerNorm(hidden, **factory)
        self.fc3 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)`; the shape is kept."""
        return self.fc3(self.norm(F.gelu(self.fc1(x))) * self.norm(self.fc2(x)))


@register(
    "activator",
    kind="block",
    formula="x + W_3 (LN_h(GELU(W_1 LN(x))) * LN_h(W_2 LN(x))); x + MLP(LN(x))",
    latex=r"\begin{aligned} x &\leftarrow x + W_3 (\mathrm{LN}_h(\mathrm{GELU}(W_1 \mathrm{LN}(x))) \odot "
    r"\mathrm{LN}_h(W_2 \mathrm{LN}(x))) \cr x &\leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)) \end{aligned}",
    family="alone",
    complexity="O(N d^2)",
    paper=Paper("Activator: GLU Activation Function as the Core Component of a Vision Transformer", "2405.15953"),
)
class Activator(Block):
    """A gated unit and an MLP behind one norm; no token sees another.

    Args:
        mlp: the second half; without it a block is the unit alone.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        mlp: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.dim = dim
        self.norm = nn.LayerNorm(dim, **factory)
        self.unit = GatedUnit(dim, hidden, **factory)
        self.mlp = Mlp(dim, hidden, **factory) if mlp else None
        self.drop_path = DropPath(drop_path)

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The residual stream; see above."""
        for kept in (layout.keep(x.device), keep):
            x = mask_tokens(x, kept)
        x = x + self.drop_path(self.unit(self.norm(x)))
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm(x)))

    def weight(self) -> Tensor | None:
        """See `Block`."""
        return held(self.norm)
