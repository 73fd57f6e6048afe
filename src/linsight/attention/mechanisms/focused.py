"""Focused linear attention: ReLU kernel attention whose queries and keys are sharpened by a power.

Han et al., "FLatten Transformer: Vision Transformer using Focused Linear Attention", ICCV 2023
(arXiv 2308.00442), by its published code. With e = 1e-6 and t a learnable vector of C channels, a
token x, all its heads together, is mapped to

    phi(x) = |u| u^p / |u^p|,   u = (relu(x) + e) / softplus(t),

which keeps the norm and turns the direction towards the largest channels. P is a table of learnable
positions on the grid of the keys. Per head, with the means over the N keys,

    o_i = phi(q_i) mean_j(phi(k_j + P_j) v_j^T) / (phi(q_i) . mean_j(phi(k_j + P_j)) + e) + conv(v)_i,

where conv is a depthwise k x k convolution whose kernel all heads share. The power is taken of
u / max(u), which is the same function and can neither overflow nor vanish.

Keys of a reduced grid, as in PVT: their v is brought back to all N tokens for the convolution by
linear interpolation along the flattened sequence. Prefix tokens, of which the publication has none,
are read and absorbed as all others, without a position and without the convolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import Features, Tile, accumulator, focus

from ..core import Rename
from ..parts.placed import PlacedKernel
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import split_heads


@register(
    "focused",
    formula="o = phi(q) mean(phi(k + P) v^T) / (phi(q) . mean(phi(k + P)) + eps) + conv(v), phi(u) = |u| u^p / |u^p|",
    latex=r"\begin{aligned} o_i &= \frac{\phi(q_i) \mathrm{mean}_j(\phi(k_j + P_j) v_j^\top)}{\phi(q_i) \cdot "
    r"\mathrm{mean}_j(\phi(k_j + P_j)) + e} + \mathrm{conv}(v)_i \cr "
    r"\phi(x) &= \lVert u \rVert \frac{u^p}{\lVert u^p \rVert}, \quad u = \frac{\mathrm{relu}(x) + "
    r"e}{\mathrm{softplus}(t)} \end{aligned}",
    family="feature map",
    also=("FLatten",),
    complexity="O(N d^2)",
    paper=Paper("FLatten Transformer: Vision Transformer using Focused Linear Attention", "2308.00442", "ICCV 2023"),
)
class Focused(PlacedKernel):
    """Linear attention with a norm-preserving power map and a depthwise convolution of v.

    Args:
        power: p, above 0. Every published model uses 3.
        kernel_size: side of the depthwise kernel, odd.
    """

    turns = "features"
    published = (
        Rename("scale", "core.scale"),
        Rename("positional_encoding", "core.positions"),
        Rename("dwc.", "core.dwc."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        power: float = 3,
        kernel_size: int = 5,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not power > 0:
            raise LinsightError(f"power={power} of 'focused' must be above 0; published models use 3")
        super().__init__(dim, num_heads, kernel_size=kernel_size, grid=grid, device=device, dtype=dtype)
        self.power = power
        positions = self.positions
        del self.positions  # to come behind the scale, where saved states of optimisers have it
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, device=device, dtype=dtype))
        self.positions = positions

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """phi, of keys with their positions."""
        dtype = accumulator(x.dtype)
        if name == "k":
            x = self.at_places(x, tile)
        scale = split_heads(self.scale.to(dtype), self.num_heads)
        return focus(x, 1 / F.softplus(scale[0, 0]), self.power)
