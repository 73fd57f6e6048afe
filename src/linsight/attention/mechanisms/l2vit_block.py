"""The global block of L2ViT: linear attention, and behind it a module of two convolutions that brings back locality.

Zheng, "The Linear Attention Resurrection in Vision Transformer" (arXiv 2501.16182), by its published code:

    x <- x + conv3x3(x)
    x <- x + attention(LN(x))                                  that of `l2vit`
    x <- x + conv7x7(BN(GELU(conv7x7(LN(x)))))
    x <- x + MLP(LN(x))

All convolutions are depthwise. Padding is zero for each of them, and in training the statistics of BN do not see it.
Prefix tokens, of which the publication has none, pass by the convolutions.
"""

from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import Layout, mask_tokens

from ..block import Block
from ..capabilities import Capabilities
from ..checks import held
from ..core import Rename
from ..layer import Attention
from ..parts.token_conv import TokenConv
from ..registry import Paper, register
from .l2vit import L2ViT


class LocalConcentration(nn.Module):
    """conv7x7(BN(GELU(conv7x7(x)))) of grid tokens."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv1 = TokenConv(dim, 7, device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(dim, device=device, dtype=dtype)
        self.conv2 = TokenConv(dim, 7, device=device, dtype=dtype)

    def forward(self, x: Tensor, size: tuple[int, int], inside: Tensor | None) -> Tensor:
        """`x` `(B, h*w, C)`, zero where `inside` `(B, h*w)` is False; `size` (h, w)."""
        x = F.gelu(self.conv1(x, size))
        if inside is not None and self.training:
            x = x.masked_scatter(inside[..., None], self.bn(x[inside]))
        else:
            x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        return self.conv2(mask_tokens(x, inside), size)


@register(
    "l2vit_block",
    kind="block",
    formula="x + conv3x3(x); x + l2vit(LN(x)); x + conv7x7(BN(GELU(conv7x7(LN(x))))); x + MLP(LN(x))",
    latex=r"\begin{aligned} x &\leftarrow x + \mathrm{conv}_{3 \times 3}(x) \cr x &\leftarrow x + \mathrm{attention}("
    r"\mathrm{LN}(x)) \cr x &\leftarrow x + \mathrm{conv}_{7 \times 7}(\mathrm{BN}(\mathrm{GELU}("
    r"\mathrm{conv}_{7 \times 7}(\mathrm{LN}(x))))) \cr x &\leftarrow x + \mathrm{MLP}(\mathrm{LN}(x)) \end{aligned}",
    family="feature map",
    complexity="O(N d^2)",
    paper=Paper("The Linear Attention Resurrection in Vision Transformer", "2501.16182"),
)
class L2ViTBlock(Block):
    """A convolution, the attention `l2vit`, a local module and an MLP."""

    capabilities = Capabilities(sizes=True, prefix=True)
    published = (Rename("cpe.0.proj.", "cpe."),)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.cpe = TokenConv(dim, 3, **factory)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = Attention(L2ViT(dim, num_heads, **factory), dim, **factory)
        self.norm3 = nn.LayerNorm(dim, **factory)
        self.local_mp = LocalConcentration(dim, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path)

    def mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """The residual stream; see above."""
        height, width, prefix = layout.grid
        inside = layout.keep(x.device)
        x = mask_tokens(x, inside)
        inside = None if inside is None else inside[:, prefix:]

        def local(module: Any, x: Tensor, *rest: Any) -> Tensor:  # 0 at prefix tokens
            out = module(mask_tokens(x[:, prefix:], inside), (height, width), *rest)
            return F.pad(out, (0, 0, prefix, 0)) if prefix else out

        x = x + local(self.cpe, x)
        x = x + self.drop_path(self.attn(self.norm1(x), layout))
        x = x + self.drop_path(local(self.local_mp, self.norm3(x), inside))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def weight(self) -> Tensor | None:
        """See `Block`."""
        return held(self.norm1)
