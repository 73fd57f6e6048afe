"""LinFusion: kernel attention by means, ELU + 1, whose queries and keys are projected from tokens and an MLP of them.

Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", arXiv 2409.02097, by its published code: the self-attention of
Stable Diffusion's U-Nets in linear time, distilled from them. With tokens x, and y those of the keys (x itself in
self-attention), m channels inside, phi(u) = ELU(u) + 1 and N_q queries,

    F(u) = W_2 LeakyReLU(LayerNorm(W_1 u + b_1)) + b_2          one for queries, one for keys; or u itself
    q = phi(W_q (x + F_q(x))),   k = phi(W_k (y + F_k(y))),   v = W_v y
    o_i = q_i (sum_j k_j v_j^T / N_q) / (q_i . mean_j k_j + 1e-4)

There is no scale d^(-1/2). The sum above the line is over keys and divided by the number of queries, as published: with
keys of another number, of a context or a coarser grid, outputs are N_k / N_q times a mean of values.

The published layer has no bias but that of its output (`qkv_bias=False`); F starts as torch starts linear layers, so
a layer that inherits the other weights does not answer as the one that they are of. m is C in released models of Stable
Diffusion 1.5 and 2.1, C / 16 in that of SDXL.
"""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Features, Layout, Tile, accumulator, count_tokens

from ..capabilities import Capabilities, Structure
from ..core import Additive, Rename
from ..layer import Attention
from ..parts.kernel import KernelCore, KernelMeans
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens


class ResidualMap(nn.Sequential, Additive):
    """F of `dim` channels, `inside` of them inside."""

    def __init__(self, dim: int, inside: int, **factory: Any) -> None:
        super().__init__(
            nn.Linear(dim, inside, **factory),
            nn.LayerNorm(inside, **factory),
            nn.LeakyReLU(0.01),
            nn.Linear(inside, dim, **factory),
        )

    def add_nothing(self) -> None:
        """The last linear map gives zeros."""
        last: Any = self[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


class MappedAttention(Attention):
    """A layer that projects queries from x + F_q(x), keys from y + F_k(y) and values from y."""

    def __init__(
        self,
        core: "LinFusion",
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: Any,
    ) -> None:
        super().__init__(core, dim, device=device, dtype=dtype, **layer)
        self.map_q, self.map_k = core.maps(dim, device=device, dtype=dtype).values()

    def given(self, x: Tensor, source: Tensor) -> dict[str, Tensor]:
        """Tokens with their maps."""
        return {**super().given(x, source), "q": x + self.map_q(x), "k": source + self.map_k(source)}


@register(
    "linfusion",
    formula="o_i = phi(q_i) (sum_j phi(k_j) v_j^T / N_q) / (phi(q_i) . mean_j phi(k_j) + eps), "
    "q = W_q (x + F_q(x)), k = W_k (x + F_k(x)), F an MLP, phi = elu + 1",
    latex=r"\begin{aligned} o_i &= \frac{\phi(q_i) \frac{1}{N_q} \sum_j \phi(k_j) v_j^\top}{\phi(q_i) \cdot "
    r"\frac{1}{N} \sum_j \phi(k_j) + 10^{-4}}, \quad \phi = \mathrm{elu} + 1 \cr "
    r"q &= W_q (x + F_q(x)), \quad k = W_k (x + F_k(x)), \quad F(u) = W_2 \mathrm{LeakyReLU}(\mathrm{LN}(W_1 u)) "
    r"\end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("LinFusion: 1 GPU, 1 Minute, 16K Image", "2409.02097"),
)
class LinFusion(KernelCore):
    """Means of phi(k) v^T and phi(k), for a layer that maps what queries and keys are projected from.

    Args:
        mid_dim: m, channels inside of F; 0 for those of the layer, -1 for the identity in the place of F.
    """

    capabilities = Capabilities(keep=True, sizes=True, cross=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    turns = "features"
    rounds = (KernelMeans(),)
    eps = 1e-4
    projections = "q_k_v"
    reduced_projections = "q_k_v"
    layer = MappedAttention
    published = (
        *(Rename(f"to_{name}.", f"{name}.") for name in "qkv"),
        *(Rename(f"to_{name}_.", f"map_{name}.") for name in "qk"),
        Rename("to_out.0.", "proj."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mid_dim: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mid_dim < -1:
            raise LinsightError(
                f"mid_dim={mid_dim} of 'linfusion' must be 1 or more, 0 for all channels, or -1 for none"
            )
        self.num_heads, self.mid_dim = num_heads, mid_dim

    def maps(self, dim: int, **factory: Any) -> dict[str, nn.Module]:
        """F_q and F_k."""
        if self.mid_dim < 0:
            return {"q": nn.Identity(), "k": nn.Identity()}
        return {part: ResidualMap(dim, self.mid_dim or dim, **factory) for part in "qk"}

    def features(self, name: str, x: Tensor, tile: Tile, done: Done) -> Features:
        """phi, of queries and keys alike."""
        return Features(x, "elu+1")

    def forward(self, tokens: Tokens, layout: Layout, *, context_layout: Layout | None = None) -> Tensor:
        """The means, and of keys that are not the queries' own tokens N_k / N_q times those of values."""
        if context_layout is not None:
            v = tokens.v.to(accumulator(tokens.v.dtype))
            asking = count_tokens(tokens.q, layout.keep(tokens.q.device))
            share = count_tokens(tokens.v, tokens.keep) / asking.clamp(min=1)
            out = super().forward(
                tokens._replace(v=v * share[:, None, None, None]), layout, context_layout=context_layout
            )
            return out.to(tokens.v.dtype)
        return super().forward(tokens, layout)
