"""Gated positional self-attention: each head mixes attention by content with attention by distance, as a gate says.

d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", ICML 2021 (arXiv
2103.10697), by its published code, which timm has, with the models. With learned W (H, 3), b and g, for each head h,

    A_ij = (1 - sigmoid(g)) softmax_j(d^(-1/2) q_i . k_j) + sigmoid(g) softmax_j(W r_ij + b)
    r_ij = (x_j - x_i, y_j - y_i, (x_j - x_i)^2 + (y_j - y_i)^2),   o_i = sum_j A_ij v_j

in tokens. A head starts as one place of a convolution: W is a bell around a token near the query, g = 1, and values
start as the layer's input, where v has a projection of its own. Rows of A sum to 1 as they are, so the published
division by that sum is left out. b, the same for all j, has no effect: it is there for published weights.

The grid need not be square. The bell is a product of one along rows and one along columns, so this half takes
O(N (H + W)) and no N x N scores. The publication has no prefix tokens in these layers. Here, as they have no place,
they attend by content alone, and tokens of the grid see them by content alone.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from linsight.ops import Grid, Layout, accumulator, attend, full_precision, mask_tokens, unflatten

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Rename
from ..layer import Attention
from ..registry import Paper, register
from ..tokens import Tokens


class Places(nn.Module):
    """W and b, which score a key by where it is, seen from the query.

    Not a linear layer, which hosts give initial weights of theirs. With C = floor(sqrt(heads)), the heads look at the
    tokens of a C x C kernel, as published; heads beyond that number look at the query.
    """

    def __init__(self, num_heads: int, strength: float, **factory: Any) -> None:
        super().__init__()
        side = math.isqrt(num_heads)
        centre = (side - 1) / 2 if side % 2 == 0 else side // 2
        around = [(x - centre, y - centre) for y in range(side) for x in range(side)]
        around += [(0.0, 0.0)] * (num_heads - side * side)
        # Published kernels run down their columns.
        rows = [[2 * strength * y, 2 * strength * x, -strength] for x, y in around]
        self.weight = nn.Parameter(torch.tensor(rows, dtype=torch.float32).to(**factory))
        self.bias = nn.Parameter(torch.zeros(num_heads, **factory))

    def forward(self, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scores along rows `(heads, W, W)` and along columns `(heads, H, H)`, queries first; their sum is W r + b."""
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        across, down, both = (part[:, None, None] for part in weight.unbind(1))
        x, y = (_distances(side, weight) for side in (grid.width, grid.height))
        return across * x + both * x.square(), down * y + both * y.square() + bias[:, None, None]


def _distances(side: int, like: Tensor) -> Tensor:
    places = torch.arange(side, device=like.device).to(like.dtype)
    return places - places[:, None]


class LocalAttention(Attention):
    """The layer, whose values start as its input."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_weights()

    def init_weights(self) -> None:
        """The published start of v."""
        if "v" in self._modules:
            nn.init.eye_(self.v.weight)  # type: ignore[arg-type,union-attr]


@register(
    "gpsa",
    formula="o_i = sum_j [(1 - s) softmax_j(d^(-1/2) q_i . k_j) + s softmax_j(w . r_ij)] v_j, s = sigmoid(g)",
    latex=r"o_i = \sum_j \left[ (1 - \sigma(g)) \mathrm{softmax}_j(d^{-1/2} q_i \cdot k_j) + \sigma(g) "
    r"\mathrm{softmax}_j(w \cdot r_{ij}) \right] v_j, \quad r_{ij} = (\Delta x, \Delta y, \Delta x^2 + \Delta y^2)",
    family="scores",
    also=("ConViT",),
    complexity="O(N^2 d)",
    paper=Paper(
        "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", "2103.10697", "ICML 2021"
    ),
)
class GPSA(Core):
    """Attention by content and by distance, gated for each head.

    Args:
        locality_strength: how narrow the bells of the distance are at the start.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(cost=Cost.QUADRATIC)
    placed = True
    projections = "qk_v"
    qkv_bias = False
    layer = LocalAttention
    published = (Rename("pos_proj.", "core.pos_proj."), Rename("gating_param", "core.gating_param"))

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        locality_strength: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_proj = Places(num_heads, locality_strength, **factory)
        self.gating_param = nn.Parameter(torch.ones(num_heads, **factory))

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """Means of v by both weights, mixed."""
        grid, keep, dtype = layout.grid, tokens.keep, tokens.v.dtype
        seen = None if keep is None else keep[:, None, None]
        q, k, v = (mask_tokens(x, keep).to(dtype) for x in tokens[:3])
        content = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen).transpose(1, 2)
        placed = keep if keep is None else keep[:, grid.prefix :]
        with full_precision(v):
            local = self.nearby(v[:, grid.prefix :], grid, placed)
        gate = self.gating_param.to(local.dtype).sigmoid()[:, None]
        ahead, content = content[:, : grid.prefix], content[:, grid.prefix :]
        mixed = torch.lerp(content.to(local.dtype), local, gate).to(dtype)
        return torch.cat([ahead, mixed], dim=1) if grid.prefix else mixed

    def nearby(self, v: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        """Means of v `(B, H*W, heads, E)` by distance alone, in the accumulator's dtype.

        Along rows first, then along columns. Where some keys are not kept, what is left of a row weighs less.
        """
        sides = (grid.height, grid.width)
        values = unflatten(v.to(accumulator(v.dtype)), 1, sides).permute(0, 3, 1, 2, 4)  # (B, heads, H, W, E)
        across, down = self.pos_proj(grid, values.dtype)
        if keep is None:
            rows = torch.einsum("hxk,bhyke->bhyxe", across.softmax(dim=-1), values)
            out = torch.einsum("hyk,bhkxe->bhyxe", down.softmax(dim=-1), rows)
        else:
            least, kept = torch.finfo(values.dtype).min, unflatten(keep, 1, sides)[:, None]
            scores = across[:, None].masked_fill(~kept[:, :, :, None], least)  # (B, heads, H of keys, W, W of keys)
            rows = scores.softmax(dim=-1) @ values
            total = scores.logsumexp(dim=-1)[:, :, None].transpose(-2, -1)  # (B, heads, 1, W, H of keys)
            scores = (down[:, :, None] + total).masked_fill(~kept.any(dim=-1)[:, :, None, None], least)
            out = (scores.transpose(2, 3).softmax(dim=-1) @ rows.transpose(2, 3)).transpose(2, 3)
        return out.permute(0, 2, 3, 1, 4).flatten(1, 2)
