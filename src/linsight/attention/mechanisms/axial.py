"""Axial attention of LLFormer: softmax attention along each row, then along each column, of normed queries and keys.

Wang et al., "Ultra-High-Definition Low-Light Image Enhancement: A Benchmark and Transformer-Based Method", AAAI 2023
(arXiv 2212.11548), from its formulas. Two layers of their own weights, the second on what the first gives, without a
residual connection between them:

    [q, k, v] = conv3x3(conv3x3(W x)),   o_i = W_o sum_j softmax_j(t q_i . k_j / (|q_i| |k_j|)) v_j,   j in the line

with depthwise convolutions and one learnt number t, from 1, for all heads; norms are at least 1e-12. The second sees a
transposed image, so its kernels lie transposed, too. Lines have any length. Images of a padded batch have a rim each. A
dropped token would be a zero in the convolutions, not a place less, so that is refused; prefix tokens are in no line.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import Layout, accumulator, attend, mask_tokens, unflatten

from ..capabilities import Capabilities, Cost, Structure
from ..checks import held
from ..core import Rename
from ..layer import Layer
from ..parts.token_conv import TokenConv
from ..registry import Paper, register
from ..tokens import merge_heads


class RowAttention(nn.Module):
    """Attention along the rows of a grid of tokens, of `dim` channels."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, proj_bias: bool, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.conv1, self.conv2 = (TokenConv(3 * dim, **factory) for _ in range(2))
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.temperature = nn.Parameter(torch.ones(1, **factory))

    def forward(self, x: Tensor, size: tuple[int, int], inside: Tensor | None = None) -> Tensor:
        """`x` `(B, h*w, C)`, `size` (h, w); `inside` `(B, h*w)` is False where there is padding."""
        x = self.qkv(mask_tokens(x, inside))
        for conv in (self.conv1, self.conv2):
            x = conv(mask_tokens(x, inside), size)
        rows = unflatten(x, 1, size).flatten(0, 1)  # (B * h, w, 3 C)
        q, k, v = (t.transpose(1, 2) for t in unflatten(rows, 2, (3, self.num_heads, -1)).unbind(2))
        dtype = accumulator(v.dtype)
        q, k = (F.normalize(t.to(dtype), dim=-1) for t in (q, k))
        q, k = (q * self.temperature.to(dtype)).to(v.dtype), k.to(v.dtype)
        seen = None
        if inside is not None:
            # Each token sees itself, so that no row sees nothing; of those inside all do.
            itself = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
            seen = unflatten(inside, 1, size).flatten(0, 1)[:, None, None] | itself
        out = merge_heads(attend(q, k, v, seen, scale=1.0).transpose(1, 2))
        return self.proj(unflatten(out, 0, (-1, size[0])).flatten(1, 2))


def turned(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens `x` `(B, h*w, ...)`, which lie row by row, column by column."""
    return unflatten(x, 1, size).transpose(1, 2).flatten(1, 2)


def _renames(published: str, ours: str) -> tuple[Rename, ...]:
    return (
        Rename(f"{published}.q1.", f"{ours}.qkv.", ones=2),
        Rename(f"{published}.q2.", f"{ours}.conv1."),
        Rename(f"{published}.q3.", f"{ours}.conv2."),
        Rename(f"{published}.fin.", f"{ours}.proj.", ones=2),
        Rename(f"{published}.fac", f"{ours}.temperature"),
    )


@register(
    "axial",
    kind="layer",
    formula="o_i = W_o sum_j softmax_j(t q_i . k_j / (|q_i| |k_j|)) v_j, j in the row of i; then the same of columns",
    latex=r"o_i = W_o \sum_j \mathrm{softmax}_j \left( t \frac{q_i \cdot k_j}{\lVert q_i \rVert \lVert k_j \rVert} "
    r"\right) v_j, \quad j \text{ in the row of } i; \text{ then columns}",
    family="window",
    also=("LLFormer",),
    complexity="O(N (H + W) d)",
    paper=Paper(
        "Ultra-High-Definition Low-Light Image Enhancement: A Benchmark and Transformer-Based Method",
        "2212.11548",
        "AAAI 2023",
    ),
)
class Axial(Layer):
    """Attention along rows, then along columns.

    Args:
        qkv_bias: of the linear maps in front of the convolutions.
        proj_bias: of the output projections.
        proj_drop: rate of dropout behind the second.
    """

    capabilities = Capabilities(sizes=True)
    structure = Structure(cost=Cost.N_ROOT_N)
    published = (*_renames("row_att", "rows"), *_renames("col_att", "columns"))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        biases = {"qkv_bias": qkv_bias, "proj_bias": proj_bias}
        self.dim, self.num_heads = dim, num_heads
        self.rows, self.columns = (RowAttention(dim, num_heads, **biases, device=device, dtype=dtype) for _ in range(2))
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The tokens `(B, H*W, C)`, mixed."""
        inside, (height, width) = layout.keep(x.device), layout.grid[:2]
        x = turned(self.rows(x, (height, width), inside), (height, width))
        inside = None if inside is None else turned(inside, (height, width))
        return self.proj_drop(turned(self.columns(x, (width, height), inside), (width, height)))

    def weight(self) -> Tensor | None:
        """See `Layer`."""
        return held(self.rows.proj)

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"num_heads={self.num_heads}"
