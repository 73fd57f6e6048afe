"""Linear attention: o_i = phi(q_i) S / (phi(q_i) . z + eps), S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j).

Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with
Linear Attention", ICML 2020, equations 5 to 7. phi is elu + 1 there; ReLU is the other plain map of
the vision papers. No scale, eps = 1e-6 on the denominator; the causal form sums over j <= i.
"""

from typing import Literal

import torch
from torch import Tensor

from linsight.ops import Features, Tile

from ..capabilities import Capabilities, Structure
from ..parts.kernel import KernelCore
from ..registry import Paper, register
from ..rounds import Done


@register(
    "linear",
    formula="o_i = phi(q_i) sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps)",
    latex=r"o_i = \frac{\phi(q_i) S}{\phi(q_i) \cdot z + \varepsilon}, \quad S = \sum_j \phi(k_j) v_j^\top, \quad z "
    r"= \sum_j \phi(k_j)",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("Transformers are RNNs", "2006.16236", "ICML 2020"),
)
class Linear(KernelCore):
    """Kernel attention with a plain feature map.

    Args:
        feature_map: phi.
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
        feature_map: Literal["elu+1", "relu"] = "elu+1",
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.feature_map = feature_map

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """phi, of queries and keys alike."""
        return Features(x, self.feature_map)
