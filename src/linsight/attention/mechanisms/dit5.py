"""DiT5: T5's inner model as diffusion transformers have it, in equal parts with softmax attention in 5x5 windows.

"Linearizing Vision Transformer with Test-Time Training", ICML 2026 (arXiv 2605.02772). Keys are normed and both
convolutions are as in `t5`; before them q and k have a learnt scale and shift a channel, and the inner model is

    f(u) = SiLU(u W1) W2   trained on (s/2N) sum |f(k') - v|^2

The windows see the raw q, k, v. A side shorter than 5 is seen whole. Prefix tokens are refused: they have no
neighbours.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from linsight.ops import Tile, accumulator, mask_tokens, neighbourhood_attention

from ..capabilities import Capabilities, Structure
from ..core import Rename
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens
from .t5 import T5


@register(
    "dit5",
    formula="o = (softmax(s q K^T) V over 5x5 windows + t5(a q + b, a' k + b', v)) / 2, f(u) = SiLU(u W1) W2",
    latex=r"\begin{aligned} o &= \tfrac{1}{2} \left( \mathrm{softmax}_{5 \times 5}(s q k^\top) v + f_{W'}(q') "
    r"\right), \quad f_W(u) = \mathrm{SiLU}(u W_1) W_2 \cr "
    r"W' &= W - \nabla_W \frac{s}{2N} \sum_n \lVert f_W(k'_n) - v_n \rVert^2, \quad s = d^{-1/2} \cr "
    r"q' &= \hat q + \mathrm{conv}(\hat q), \quad \hat q = a_q \odot q + b_q \cr "
    r"k' &= n + \mathrm{conv}(n), \quad n = \frac{\hat k - \mathrm{mean}(\hat k)}{\sqrt{\mathrm{var}(\hat k) + "
    r"1}}, \quad \hat k = a_k \odot k + b_k \end{aligned}",
    family="inner weights",
    complexity="O(N d^2)",
    paper=Paper("Linearizing Vision Transformer with Test-Time Training", "2605.02772", "ICML 2026"),
)
class DiT5(T5):
    """T5's two-layer inner model under a squared loss, mixed half and half with attention in 5x5 windows.

    Windows are shifted inward at the rim, so that each query sees 25 keys (all of a side shorter than 5).
    """

    structure = Structure(stream=True)
    capabilities = Capabilities(sizes=True)  # a dropped token leaves a hole in the windows, not fewer keys
    window: ClassVar[int] = 5
    published = (
        *T5.published,
        Rename("qk_scale_ttt", "core.qk_scale"),
        Rename("qk_offset_ttt", "core.qk_offset"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, inner_model="mlp2", loss="mse", device=device, dtype=dtype)
        self.halo = self.window - 1
        # (..., 0) of queries, (..., 1) of keys
        self.qk_scale = nn.Parameter(torch.ones(1, 1, dim, 2, device=device, dtype=dtype))
        self.qk_offset = nn.Parameter(torch.zeros(1, 1, dim, 2, device=device, dtype=dtype))

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """Both ways, in equal parts."""
        q, k, v = (mask_tokens(x, tokens.keep) for x in tokens[:3])
        near = neighbourhood_attention(q, k, v, tile, self.window)
        return ((self.answer(tokens, tile, done[-1]) + near) / 2).to(tokens.q.dtype)

    def prepare(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """The learnt scale and shift."""
        x, i = x.to(accumulator(x.dtype)), "qk".index(name)
        return x * self.qk_scale[..., i].to(x.dtype) + self.qk_offset[..., i].to(x.dtype)
