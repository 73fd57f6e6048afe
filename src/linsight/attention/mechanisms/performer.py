"""Performer: kernel attention with random features, which estimate the softmax kernel without bias (FAVOR+).

Choromanski et al., "Rethinking Attention with Performers", ICLR 2021 (arXiv 2009.14794), with the constants of its
published code. Rows of Omega (m x d) are random, orthogonal in blocks of d. Per head, with x' = d^(-1/4) x,

    o_i = phi_q(q_i) S / (phi_q(q_i) . z),   S = sum_j phi_k(k_j) v_j^T,   z = sum_j phi_k(k_j)
    phi(x) = exp(Omega x' - |x'|^2 / 2 - top) + 1e-4

where top, a constant for autograd, is the largest entry of Omega q_i' for a query, and that of all Omega k_j' for the
keys: a maximum of each key's own would weight it anew. So the keys are gone through twice. The published factor
m^(-1/2) cancels. The generalised kernel ("relu") is relu(Omega x') + 1e-3, in one round. There is no eps below the
line: features are positive. Features are computed in float32 (float64 for float64).

Omega is a buffer that heads share and checkpoints hold. Training draws it anew every 1000 updates, as published:
`redraw()`. The causal form is not here.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Features, LinearState, Tile, accumulator, full_precision, mask_tokens

from ..capabilities import Capabilities, Structure
from ..core import Rename, Renews
from ..parts.kernel import KernelCore, KernelSums
from ..registry import Paper, register
from ..rounds import Done, Round
from ..tokens import Tokens


class KeyTop(NamedTuple):
    """top: `(B, H)` the largest feature score of the keys, -inf where there is none."""

    top: Tensor

    def merge(self, other: "KeyTop") -> "KeyTop":
        """The larger one."""
        return KeyTop(torch.maximum(self.top, other.top))


class KeyMaximum(Round):
    """The largest entry of all Omega k' of a head."""

    def absorb(self, core: "Performer", tokens: Tokens, tile: Tile, done: Done) -> KeyTop:
        """Over the tile's tokens."""
        scores = core.scores(tokens.k.detach())
        return KeyTop(mask_tokens(scores, tokens.keep, float("-inf")).amax(dim=(1, 3)))

    def finish(self, core: "Performer", state: KeyTop, done: Done) -> Tensor:
        """`(B, 1, H, 1)`; 0 for an image without keys, whose features nobody sums."""
        return state.top.masked_fill(state.top == float("-inf"), 0)[:, None, :, None]


class PositiveSums(KernelSums):
    """S and z of positive features."""

    def finish(self, core: "Performer", state: LinearState, done: Done) -> LinearState:
        """As they are; z is 1 where nothing was absorbed, so that 0 is read."""
        return LinearState(state.kv, state.k.masked_fill(state.k == 0, 1))


@register(
    "performer",
    formula="o_i = phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j)), "
    "phi(x) = exp(Omega x' - |x'|^2 / 2 - max) + eps, x' = d^(-1/4) x",
    latex=r"\begin{aligned} o_i &= \frac{\phi_q(q_i) S}{\phi_q(q_i) \cdot z}, \quad S = \sum_j \phi_k(k_j) v_j^\top, "
    r"\quad z = \sum_j \phi_k(k_j) \cr "
    r"\phi(x) &= \exp \left( \Omega x' - \tfrac{1}{2} \lVert x' \rVert^2 - \mathrm{top} \right) + 10^{-4}, "
    r"\quad x' = d^{-1/4} x \end{aligned}",
    family="feature map",
    also=("FAVOR+",),
    complexity="O(N m d)",
    paper=Paper("Rethinking Attention with Performers", "2009.14794", "ICLR 2021"),
)
class Performer(KernelCore):
    """Kernel attention with orthogonal random features.

    Args:
        features: m, the number of random features; 0 is d ln d, rounded down.
        kernel: "softmax" estimates softmax attention, "relu" is the generalised kernel.
        scaling: 0 gives rows of Omega the norms of Gaussian vectors, 1 the norm sqrt(d).
    """

    projection_matrix: Tensor
    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    renews = Renews("drawn", 1000)
    turns = "features"
    projections = "q_k_v"
    published = (
        *(Rename(f"to_{name}.", f"{name}.") for name in "qkv"),
        Rename("to_out.", "proj."),
        Rename("fast_attention.", "core."),
    )
    eps = 0.0

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        features: int = 0,
        kernel: Literal["softmax", "relu"] = "softmax",
        scaling: Literal[0, 1] = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if features < 0:
            raise LinsightError(f"features={features} of 'performer' must be a number above 0, or 0 for d ln d")
        width = dim // num_heads
        self.num_heads = num_heads
        self.kernel, self.scaling = kernel, scaling
        self.rounds = (KeyMaximum(), PositiveSums()) if kernel == "softmax" else (PositiveSums(),)
        count = features or max(1, int(width * math.log(width)))
        self.register_buffer("projection_matrix", torch.empty(count, width, device=device, dtype=dtype))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw Omega anew, as published training does every 1000 steps."""
        omega = self.projection_matrix
        if not omega.is_meta:
            omega.copy_(orthogonal_rows(*omega.shape, scaling=self.scaling))

    def scores(self, x: Tensor) -> Tensor:
        """Omega x' `(B, n, H, m)` of `x` `(B, n, H, D)`, in the accumulator's dtype."""
        x = x.to(accumulator(x.dtype))
        with full_precision(x):
            return x * x.shape[-1] ** -0.25 @ self.projection_matrix.to(x.dtype).transpose(-1, -2)

    def features(self, name: Literal["q", "k"], x: Tensor, tile: Tile, done: Done) -> Features:
        """phi."""
        scores = self.scores(x)
        if self.kernel == "relu":
            return Features(scores.relu() + 1e-3)
        top = done[0] if name == "k" else scores.detach().amax(dim=-1, keepdim=True)
        half_square = x.to(scores.dtype).square().sum(dim=-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)
        return Features(torch.exp(scores - half_square - top) + 1e-4)


def orthogonal_rows(count: int, width: int, *, scaling: int) -> Tensor:
    """`(count, width)` in float32, on the CPU: random rows, orthogonal in blocks of `width`; `scaling` as above."""
    squares = [torch.randn(width, width, device="cpu") for _ in range(-(-count // width))]
    rows = torch.cat([torch.linalg.qr(square).Q.transpose(-1, -2) for square in squares])[:count]
    if scaling:
        return rows * width**0.5
    return rows * torch.randn(count, width, device="cpu").norm(dim=1, keepdim=True)
