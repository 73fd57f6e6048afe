"""Varied-size window attention: each head of each window reads a rectangle of the map, of a place and size of its own.

Zhang et al., "VSA: Learning Varied-Size Window Attention in Vision Transformers", ECCV 2022 (arXiv 2204.08446), by its
published code. Windows have w x w tokens. For each head, with r of a window the mean of its tokens x,

    t = W_t leaky_relu(r) + b_t,   s = W_s leaky_relu(r) + b_s            a move and a growth, of columns and of rows
    p_i = c + (1 + s) (i - (w - 1) / 2) + t (L' - 1) / (2 floor(L / w))   where place i reads, c the window's centre
    o = softmax(d^(-1/2) q K^T + b) V                                     K and V bilinear at p, b as of Swin

with L the side and L' that padded to whole windows. Beyond the grid are zeros, that is keys and values of 0, which are
seen, and which count in means. A published side below a window divides by 0; here such an L counts as w.

The published start of both maps is that of a convolution, not zero. Published layers are built for one image size; here
any goes, and each image of a padded batch has its own rim. A dropped token would be a key of 0, so that is refused;
prefix tokens are in no window. Computed in float32 (float64 for float64): places in half precision are tokens apart.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linsight.errors import LinsightError
from linsight.ops import (
    Layout,
    Partition,
    accumulator,
    at_least,
    attend,
    divided,
    full_precision,
    mask_tokens,
    to_multiple,
    unflatten,
)

from ..capabilities import Capabilities, Cost, Structure
from ..core import Core, Rename
from ..parts.wide import WideLinear
from ..parts.window_table import WindowTable
from ..registry import Paper, register
from ..tokens import Tokens, merge_heads, split_heads


@register(
    "vsa",
    formula="o_i = sum_j softmax_j(d^(-1/2) q_i . k(p_j) + b_(i-j)) v(p_j), p_j places of a rectangle that each head "
    "and window moves and scales by its mean",
    latex=r"o_i = \sum_j \mathrm{softmax}_j(d^{-1/2} q_i \cdot k(p_j) + b_{i - j}) v(p_j), \quad p_j = c + (1 + s) "
    r"(j - \bar j) + t, \quad s, t \text{ of the mean of the window}",
    family="window",
    complexity="O(N w^2 d)",
    paper=Paper("VSA: Learning Varied-Size Window Attention in Vision Transformers", "2204.08446", "ECCV 2022"),
)
class VSA(WindowTable, Core):
    """Attention from windows to rectangles that heads choose.

    Args:
        window: w, in tokens.
    """

    capabilities = Capabilities(sizes=True)
    structure = Structure(cost=Cost.WINDOWED)
    placed = True
    published = (
        Rename("qkv.", "qkv.", ones=2),
        Rename("proj.", "proj.", ones=2),
        Rename("sampling_offsets.2.", "core.sampling_offsets.", ones=2),
        Rename("sampling_scales.2.", "core.sampling_scales.", ones=2),
        Rename("relative_position_bias_table", "core.relative_position_bias_table"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if window < 1:
            raise LinsightError(f"window={window} of 'vsa' must be 1 or more, in tokens; published is 7")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.make_table((window, window), num_heads, **factory)
        self.sampling_offsets, self.sampling_scales = (WideLinear(dim, 2 * num_heads, **factory) for _ in range(2))

    def init_weights(self) -> None:
        """The published start of both maps, which are convolutions there."""
        for linear in (self.sampling_offsets, self.sampling_scales):
            linear.reset_parameters()

    def forward(self, tokens: Tokens, layout: Layout) -> Tensor:  # type: ignore[override]
        """Attention of the tokens of each window to what its rectangles show."""
        windows, dtype = Partition(layout.grid, self.window), accumulator(tokens.v.dtype)
        with full_precision(tokens.v):
            k, v = (mask_tokens(t.to(dtype), tokens.keep) for t in tokens[1:3])
            both = torch.cat([k, v], dim=-1).permute(0, 2, 3, 1).flatten(0, 1)  # (B * H, 2 D, N)
            canvas = unflatten(both, 2, layout.grid[:2])
            seen = F.grid_sample(canvas, self.places(tokens, layout, windows), align_corners=False)
            seen = unflatten(seen[:, :, 0], 0, (-1, self.num_heads)).permute(0, 3, 1, 2)
            seen = seen.reshape(-1, self.window[0] ** 2, *seen.shape[2:]).transpose(
                1, 2
            )  # (B * windows, H, w * w, 2 D)
            k, v = seen.split([k.shape[-1], v.shape[-1]], dim=-1)
            # Heads merged: torch.compile does not know how the gradient of padding lies in memory with further axes.
            q = split_heads(windows.cut(merge_heads(tokens.q.to(dtype))), self.num_heads).transpose(1, 2)
            out = attend(q, k, v, self.bias().to(dtype))
        return windows.join(out.transpose(1, 2)).to(tokens.v.dtype)

    def places(self, tokens: Tokens, layout: Layout, windows: Partition) -> Tensor:
        """Where each token of each window reads, `(B * H, 1, windows * w * w, 2)`: column and row, from -1 to 1.

        There is no axis of windows alone, of which there may be one: a graph must not ask.
        """
        x, size = merge_heads(tokens.v) if tokens.x is None else tokens.x, self.window[0]
        x = mask_tokens(x.to(accumulator(x.dtype)), tokens.keep)
        mean = F.leaky_relu(windows.cut(x).mean(dim=1))
        moves, scales = (
            unflatten(linear(mean), 1, (1, -1, 2)) for linear in (self.sampling_offsets, self.sampling_scales)
        )  # (B * windows, 1, H, 2)
        count = windows.counts[0] * windows.counts[1]
        _, number = divided(torch.arange(x.shape[0] * count, device=x.device), count)
        corners = divided(number, windows.counts[1])
        cells = divided(torch.arange(size * size, device=x.device), size)
        found = []
        for axis in (1, 0):  # columns first
            side: Any = layout.grid[axis]
            if layout.sizes is not None:
                side = layout.sizes[:, axis].to(x.device).repeat_interleave(count).view(-1, 1, 1)
            least = (side // size).clamp(min=1) if isinstance(side, Tensor) else at_least(side // size, 1)
            step = cells[axis].to(x.dtype)[:, None] - (size - 1) / 2
            place = (corners[axis] * size).to(x.dtype)[:, None, None] + (size - 1) / 2
            place = place + step * (1 + scales[..., 1 - axis])
            last = to_multiple(side, size) - 1
            last = last.to(x.dtype) if isinstance(last, Tensor) else last  # whole numbers would be divided in float32
            place = place + moves[..., 1 - axis] * (last / (2 * least))
            found.append((2 * place + 1) / layout.grid[axis] - 1)
        places = torch.stack(found, dim=-1)  # (B * windows, w * w, H, 2)
        places = places.reshape(-1, count * size * size, self.num_heads, 2)
        return places.transpose(1, 2).flatten(0, 1)[:, None]

    def no_weight_decay(self) -> set[str]:
        """The table, as published."""
        return {"relative_position_bias_table"}

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, window={self.window[0]}"
