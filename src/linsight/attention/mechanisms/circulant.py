"""Circulant attention: the attention matrix of each channel is block-circulant, and is applied by 2-D FFT.

Han et al., "Vision Transformers are Circulant Attention Learners", AAAI 2026 (arXiv 2512.21542). With offsets and
positions modulo height and width, for each channel c of N tokens:

    a_c[s] = N^(-1/2) sum_p q_c[p] k_c[p + s]          one score for each offset
    o_c[i] = sum_s softmax_s(a_c) v_c[i + s]           row i is row 0 shifted to i
    out = W_o (o * SiLU(W_g x + b_g))

Both sums are circular correlations. Channels are heads of width 1, so the number of heads has no effect; q, k
and v are projected without a bias. The published code projects the spectrum of x in place of x, which is the same, as
both are linear. On a CPU it takes as long at 14x14 and two thirds of the time at 56x56, where fewer channels have to be
brought in front of the grid; but the mean of a channel is then what a projection in half precision rounds.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import Layout, accumulator, circular_correlation, full_precision

from ..capabilities import Cost, Structure
from ..core import OPEN_SILU, Core, Rename
from ..registry import Paper, register
from ..tokens import Tokens, merge_heads, split_heads


@register(
    "circulant",
    formula="o_i = SiLU(W_g x_i) * sum_s softmax_s(N^(-1/2) sum_p q_p k_(p+s)) v_(i+s)",
    latex=r"\begin{aligned} a_c[s] &= N^{-1/2} \sum_p q_c[p] k_c[p + s] \cr "
    r"o_c[i] &= \sum_s \mathrm{softmax}_s(a_c) v_c[i + s] \cr "
    r"\mathrm{out} &= W_o (o \odot \mathrm{SiLU}(W_g x + b_g)) \end{aligned}",
    family="spectrum",
    complexity="O(N log N d)",
    paper=Paper("Vision Transformers are Circulant Attention Learners", "2512.21542", "AAAI 2026"),
)
class Circulant(Core):
    """Softmax over circular offsets, one map a channel, with a gate."""

    structure = Structure(cost=Cost.N_LOG_N)
    qkv_bias = False
    published = (Rename("gate.0.", "core.gate."),)

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
        self.gate = nn.Linear(dim, dim, device=device, dtype=dtype)

    def start_neutral(self) -> None:
        """Open the gate: SiLU is 1."""
        super().start_neutral()
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, OPEN_SILU)

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """Two circular correlations, in float32 whatever the dtype of the tokens."""
        height, width, _ = layout.grid
        dtype = accumulator(tokens.q.dtype)
        q, k, v = (self._map(t, height, width) for t in tokens[:3])
        gate = self.gate(merge_heads(tokens.v) if tokens.x is None else tokens.x)
        with full_precision(q):
            scores = circular_correlation(q, k) * (height * width) ** -0.5
            weights = scores.flatten(2).softmax(dim=-1).reshape(scores.shape)
            out = circular_correlation(weights, v).flatten(2).transpose(1, 2)
            out = out * F.silu(gate.to(dtype))
        return split_heads(out, self.num_heads).to(tokens.q.dtype)

    @staticmethod
    def _map(x: Tensor, height: int, width: int) -> Tensor:
        """`(B, N, heads, D)` -> `(B, C, H, W)`, contiguous: an FFT over strided axes is several times slower."""
        x = merge_heads(x).transpose(1, 2).contiguous()
        return x.view(x.shape[0], x.shape[1], height, width)
