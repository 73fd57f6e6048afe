"""L2ViT attention: ReLU kernel attention whose sum of weights is at least 100, with a temperature on the outputs.

Zheng, "The Linear Attention Resurrection in Vision Transformer" (arXiv 2501.16182), by its published code. Per head,
with r = relu and a learnable t, d^(-1/2) at the start,

    o_i = t r(q_i) S / max(r(q_i) . z, 100),   S = sum_j r(k_j) v_j^T,   z = sum_j r(k_j)

The sum is one over tokens, not a mean: of few tokens the weights sum to less than 1, and outputs grow with their number
until the sum reaches 100. All is computed in float32 (float64 for float64): sums over a large image are beyond float16.
"""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.ops import Features, LinearState, Tile, accumulator, apply_state, full_precision

from ..capabilities import Capabilities, Structure
from ..core import Rename
from ..parts.kernel import KernelCore
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens

_LEAST = 100.0  # of the sum of weights


@register(
    "l2vit",
    formula="o_i = t relu(q_i) sum_j relu(k_j) v_j^T / max(relu(q_i) . sum_j relu(k_j), 100)",
    latex=r"o_i = t \frac{\mathrm{relu}(q_i) \sum_j \mathrm{relu}(k_j) v_j^\top}{\max(\mathrm{relu}(q_i) \cdot \sum_j "
    r"\mathrm{relu}(k_j), 100)}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("The Linear Attention Resurrection in Vision Transformer", "2501.16182"),
)
class L2ViT(KernelCore):
    """ReLU kernel attention with a clamped sum of weights and a temperature for each head."""

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    turns = "features"
    published = (Rename("temperature", "core.temperature"),)

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
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), (dim // num_heads) ** -0.5, **factory))

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """r, of queries and keys alike."""
        return Features(x, "relu")

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """t r(q) S over the clamped sum."""
        q, state = self.features("q", tokens.q, tile, done).mapped(), done[-1]
        assert isinstance(state, LinearState)
        with full_precision(q):
            below = apply_state(q, state.k[..., None]).clamp(min=_LEAST)
            scale = self.temperature.to(accumulator(q.dtype)).transpose(0, 1)
            return (apply_state(self.by_place(q, tile), state.kv) / below * scale).to(tokens.q.dtype)
