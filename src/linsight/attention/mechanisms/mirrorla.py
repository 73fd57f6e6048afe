"""Reflect, then ReLU: kernel attention whose queries and keys are mirrored first, so that less of them is cut off.

After "MirrorLA: Reflecting Feature Map for Vision Linear Attention" (arXiv 2602.04346), a preprint without code.
Experimental: the idea of its abstract, not its formulas, which were not at hand. ReLU drops what is negative of queries
and keys. One orthogonal map of both leaves every q . k as it is, so it may turn what counts to where it is kept. Per
head, and per block of channels, with learnable u_1 ... u_r,

    x <- x - 2 u (u . x) / (|u|^2 + 1e-6)   for each u in turn,   phi(x) = relu(x)
    o_i = phi(q_i) S / (phi(q_i) . z + 1e-6),   S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j)

Two equal reflections cancel, and so they start, in pairs: as linear attention with ReLU. An odd one is drawn alone.
Reflections across heads, and angles that follow the variance of the tokens, of which the abstract tells, are left out.
"""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Features, Tile, accumulator, unflatten

from ..capabilities import Capabilities, Structure
from ..parts.kernel import KernelCore
from ..registry import Paper, register
from ..rounds import Done

_EPS = 1e-6


@register(
    "mirrorla",
    formula="o_i = phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps), phi(x) = relu(H x), "
    "H = prod_r (I - 2 u_r u_r^T / |u_r|^2)",
    latex=r"o_i = \frac{\phi(q_i) \sum_j \phi(k_j) v_j^\top}{\phi(q_i) \cdot \sum_j \phi(k_j) + \varepsilon}, \quad "
    r"\phi(x) = \mathrm{relu}(H x), \quad H = \prod_r \left( I - 2 \frac{u_r u_r^\top}{\lVert u_r \rVert^2} \right)",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("MirrorLA: Reflecting Feature Map for Vision Linear Attention", "2602.04346"),
)
class MirrorLA(KernelCore):
    """ReLU kernel attention behind learnable reflections of queries and keys (experimental).

    Args:
        reflections: r, one after the other; 0 is plain ReLU attention.
        blocks: parts of a head's channels that are reflected apart, a divisor of their number.
        causal: token i sees tokens j <= i only; then there are no tiles.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True, causal=True)
    turns = "features"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        reflections: int = 2,
        blocks: int = 1,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = dim // num_heads
        if reflections < 0:
            raise LinsightError(f"reflections={reflections} of 'mirrorla' must be 0 or more")
        if blocks < 1 or width % blocks:
            raise LinsightError(f"blocks={blocks} of 'mirrorla' must divide the width of a head, {width}")
        self.num_heads = num_heads
        self.causal = causal
        self.blocks = blocks
        shape: Any = (reflections, num_heads, blocks, width // blocks)
        self.mirrors = nn.Parameter(torch.randn(*shape, device=device, dtype=dtype))
        with torch.no_grad():
            self.mirrors[1::2] = self.mirrors[: reflections // 2 * 2 : 2]

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """relu(H x), of queries and keys alike."""
        x = unflatten(x.to(accumulator(x.dtype)), -1, (self.blocks, -1))
        for mirror in self.mirrors.to(x.dtype):
            share = (x * mirror).sum(dim=-1, keepdim=True) / (mirror.square().sum(dim=-1, keepdim=True) + _EPS)
            x = x - 2 * share * mirror
        return Features(x.flatten(-2), "relu")
