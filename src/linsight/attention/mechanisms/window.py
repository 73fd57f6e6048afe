"""Window attention: softmax inside windows of the grid, which every second block shifts by half a window.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021 (arXiv 2103.14030).
With windows of h x w tokens and a learnt bias b of the distance,

    o_i = sum_j softmax_j(d^(-1/2) q_i . k_j + b_(i - j)) v_j,   j in the window of i

A shifted window at the rim holds what is there of it, and sees nothing else: the tokens from the other rim that are
computed with it are masked, as published. A grid is padded to whole windows, and what pads it is not seen, while timm's
is. A side that is within one window is not shifted; in a padded batch, that of each image. With a bias, published
windows that are larger than the grid shrink to it: here they read the middle of the table, which comes to the same
where weights were made for this window.

Swin's own host gives such windows to `softmax`; this is for all others. Prefix tokens are refused: they are in no
window.
"""

from typing import Literal

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Layout, Partition, attend, mask_tokens

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Rename
from ..parts.window_table import WindowTable
from ..registry import Paper, register
from ..tokens import Tokens, merge_heads, split_heads


@register(
    "window",
    formula="o_i = sum_j softmax_j(d^(-1/2) q_i . k_j + b_(i-j)) v_j, j in the window of i, shifted in every second "
    "block",
    latex=r"o_i = \sum_j \mathrm{softmax}_j(d^{-1/2} q_i \cdot k_j + b_{i - j}) v_j, \quad j \text{ in the window of } "
    r"i, \text{ shifted in every second block}",
    family="window",
    also=("Swin",),
    complexity="O(N w^2 d)",
    paper=Paper("Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", "2103.14030", "ICCV 2021"),
)
class Window(WindowTable, Core):
    """Attention in windows that cut the grid; the window may differ for height and width, as a pair.

    Args:
        window: its side, in tokens.
        shift: windows are shifted by half a side, rounded down, in blocks of odd index ("alternate"), or in this one.
        rpb: a learnt bias for each distance and head.
    """

    capabilities = Capabilities(keep=True, sizes=True)
    structure = Structure(cost=Cost.WINDOWED)
    placed = True
    turns = "tokens"
    published = (Rename("relative_position_bias_table", "core.relative_position_bias_table"),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int | tuple[int, int] = 7,
        shift: Literal["alternate", "always", "never"] = "alternate",
        rpb: bool = True,
        index: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = window if isinstance(window, tuple | list) else (window, window)
        if min(height, width) < 1:
            raise LinsightError(f"window={window} of 'window' must be 1 or more, in tokens; published are 7 and 12")
        self.num_heads, self.window, self.rpb = num_heads, (height, width), rpb
        self.halo = max(height, width) - 1
        shifted = shift == "always" or (shift == "alternate" and (index or 0) % 2 == 1)
        self.shift = (height // 2, width // 2) if shifted else (0, 0)
        if rpb:
            self.make_table(self.window, num_heads, device=device, dtype=dtype)

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """Attention in the window of each token."""
        windows, v = Partition(layout.grid, self.window, self.shift, images=layout.sizes), tokens.v
        q, k, v = (mask_tokens(x, tokens.keep).to(v.dtype) for x in tokens[:3])
        # Heads merged: torch.compile does not know how the gradient of padding lies in memory with further axes.
        q, k, v = (split_heads(windows.cut(merge_heads(x)), self.num_heads).transpose(1, 2) for x in (q, k, v))
        bias = self.bias().to(v.dtype) if self.rpb else None
        seen = self.seen(windows, tokens)
        if seen is not None:
            # Each token sees itself, so that there is no row of minus infinity; of those that are kept all do.
            seen = seen | torch.eye(windows.inner.tokens, dtype=torch.bool, device=v.device)
            bias = torch.where(seen, v.new_zeros(()) if bias is None else bias, float("-inf"))
        return windows.join(attend(q, k, v, bias).transpose(1, 2))

    def seen(self, windows: Partition, tokens: Tokens) -> Tensor | None:
        """Which tokens of a window see which, `(B * windows, 1, 1 or n, n)` bool; None where all see all."""
        keep = windows.keep(tokens.v) if tokens.keep is None else windows.cut(tokens.keep)
        seen = None if keep is None else keep[:, None, None]
        region = windows.regions(tokens.v)
        if region is None:
            return seen
        together = region[:, None, :, None] == region[:, None, None]
        return together if seen is None else seen & together

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The window of the bias table, if there is one."""
        return super().table_grids() if self.rpb else {}

    def no_weight_decay(self) -> set[str]:
        """The table, as published."""
        return {"relative_position_bias_table"} if self.rpb else set()

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, window={self.window}, shift={self.shift}"
