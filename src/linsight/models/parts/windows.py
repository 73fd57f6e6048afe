"""Attention in one of Swin's windows, with a relative position bias."""

from typing import Any

from torch import Tensor

from linsight.attention import Attention
from linsight.attention.parts.window_table import WindowTable, fit_bias_table
from linsight.ops import LayoutLike

__all__ = ["WindowAttention", "fit_bias_table"]


class WindowAttention(WindowTable, Attention):
    """Attention in a window, with Swin's relative position bias: a table `((2h-1) * (2w-1), heads)` for the scores."""

    def __init__(self, *args: Any, window: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.proj.weight
        self.make_table(window, self.num_heads, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor, layout: LayoutLike, *, score_bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """See `Attention.forward`; `x` are the tokens of one window."""
        bias = self.bias()
        return super().forward(x, layout, score_bias=bias if score_bias is None else bias + score_bias, **kwargs)
