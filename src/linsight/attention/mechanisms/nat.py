"""Neighbourhood attention: softmax over the K x K tokens nearest to each query on the grid, at any dilation and stride.

Hassani et al., "Neighborhood Attention Transformer", CVPR 2023 (arXiv 2204.07143); Hassani and Shi, "Dilated
Neighborhood Attention Transformer" (arXiv 2209.15001); Hassani et al., "Generalized Neighborhood Attention" (arXiv
2504.16922). With a learnt bias b of the distance, key minus query in units of the dilation, each head gives

    o_i = sum_j softmax_j(d^(-1/2) q_i . k_j + b_(j - i)) v_j,   j in the window of i

At the rim a window moves inward, so that each query has K^2 keys, and with dilation D a query sees only tokens D apart.
With stride S the tokens of S x S blocks share a window: S = K cuts the grid into windows as Swin does. Causal windows
end at the query. K = H = W is softmax attention.

The publications refuse a side below K D tokens; here its dilation shrinks to what fits, and a side shorter than K is
seen whole. Prefix tokens are refused: they have no neighbours. Windows follow the grid, so a dropped token would leave
a hole in them, not fewer keys; images of a padded batch have a rim each. Of a sequence, windows are (1, K); on grids
of three axes, as of videos, it is `linsight.ops.neighbourhood_attention_nd`.
"""

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import (
    AxisWindow,
    FittedTable,
    Layout,
    Tile,
    accumulator,
    mask_tokens,
    neighbourhood_attention,
    resize_matrix,
    separable,
)

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Rename
from ..registry import Paper, register
from ..tokens import Tokens


@register(
    "nat",
    formula="o_i = sum_j softmax_j(d^(-1/2) q_i . k_j + b_(j-i)) v_j, j in the K x K window around i",
    latex=r"o_i = \sum_{j \in w(i)} \mathrm{softmax}_j(d^{-1/2} q_i \cdot k_j + b_{j - i}) v_j, \quad w(i) \text{ "
    r"the } K \times K \text{ window of } i",
    family="window",
    also=("DiNAT", "GNA", "NATTEN"),
    complexity="O(N K^2 d)",
    paper=Paper("Neighborhood Attention Transformer", "2204.07143", "CVPR 2023"),
)
class NAT(Core):
    """Attention in a window around each token; options may differ for height and width, as a pair.

    Args:
        kernel_size: side of the window, in tokens.
        dilation: distance of its tokens.
        stride: side of the blocks that share a window, at most the kernel size.
        is_causal: no keys after the query, along the side.
        rpb: a learnt bias for each distance and head.
    """

    capabilities = Capabilities(sizes=True)
    structure = Structure(cost=Cost.WINDOWED)
    turns = "tokens"
    published = (Rename("rpb", "core.rpb"),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        is_causal: bool | tuple[bool, bool] = False,
        rpb: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        options = (kernel_size, dilation, stride, is_causal)
        each = [tuple(option) if isinstance(option, tuple | list) else (option, option) for option in options]
        down, across = (AxisWindow(*side) for side in zip(*each, strict=True))
        for side in (down, across):
            if side.kernel < 1 or side.dilation < 1 or not 1 <= side.stride <= side.kernel:
                raise LinsightError(
                    f"kernel_size={side.kernel}, dilation={side.dilation}, stride={side.stride} of 'nat': each must be "
                    f"at least 1, and the stride at most the kernel size"
                )
        self.window = (down, across)
        shape = (num_heads, 2 * down.kernel - 1, 2 * across.kernel - 1)
        self.rpb = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if rpb else None
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """Attention in the window of each token."""
        q, k, v = (mask_tokens(x, tokens.keep) for x in tokens[:3])
        tile = Tile.whole(layout.grid, layout.sizes)
        return neighbourhood_attention(q, k, v, tile, self.window, self.rpb).to(tokens.v.dtype)

    def fit_table(self, name: str, table: Tensor) -> FittedTable | None:
        """A published table of another kernel, bicubic to ours."""
        sides = table.shape[1:]
        if name != "rpb" or self.rpb is None or len(sides) != 2 or not all(side % 2 for side in sides):
            return None
        wide = table.to(accumulator(table.dtype))
        rows, columns = (
            resize_matrix(old, new, "bicubic", device=wide.device, dtype=wide.dtype)
            for old, new in zip(sides, self.rpb.shape[1:], strict=True)
        )
        fitted = separable(wide[..., None], rows, columns)[..., 0].to(table.dtype)
        kernels = [((h + 1) // 2, (w + 1) // 2) for h, w in (sides, self.rpb.shape[1:])]
        return FittedTable(fitted, *kernels)

    def no_weight_decay(self) -> set[str]:
        """The table, as published."""
        return set() if self.rpb is None else {"rpb"}

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, window={tuple(map(tuple, self.window))}"
