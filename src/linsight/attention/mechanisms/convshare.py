"""ConvShareViT: softmax attention whose projections are convolutions of each token as a map, shared by all tokens.

"ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space Optical
Accelerators" (arXiv 2504.11517), of which there is no published code. Its idea: the C numbers of a token are a map of
s x t, and in the place of each linear layer all tokens are convolved by the same kernels, as an optical correlator does
at once. With a kernel as large as the map and no padding that is the linear layer again. With zeros around the map, as
here, each number of a query, key or value sees its neighbours in the token alone. Kernels and heads are not published;
here each head has a kernel for each of the three, and one for the output, so heads are as wide as the token:

    o_i = b + sum_h conv_oh(a_ih),   a_ih = sum_j softmax_j(C^(-1/2) q_ih . k_jh) v_jh
    q_ih = conv_qh(x_i),  k_ih = conv_kh(x_i),  v_ih = conv_vh(x_i)

so it costs as much as H heads of the whole width. A map is as near to a square as C allows.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import Layout, copied, unflatten

from ..layer import Attention
from ..registry import Paper, register
from ..tokens import Tokens
from .softmax import Softmax


class SharedConvs(Attention):
    """A layer whose projections are convolutions of tokens as maps."""

    core: "ConvShare"

    def __init__(
        self,
        core: "ConvShare",
        dim: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        projections: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: Any,
    ) -> None:
        if projections not in (None, "none"):
            raise LinsightError(f"projections='{projections}': 'convshare' has convolutions of its own, leave it out")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(core, dim, projections="none", **factory, **layer)
        size, heads = core.kernel_size, core.num_heads
        self.q = nn.Conv2d(1, heads, size, padding=size // 2, bias=qkv_bias, **factory)
        self.kv = nn.Conv2d(1, 2 * heads, size, padding=size // 2, bias=qkv_bias, **factory)
        self.proj = nn.Conv2d(heads, 1, size, padding=size // 2, bias=proj_bias, **factory)  # type: ignore[assignment]

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """Heads as wide as tokens: queries of `x`, keys and values of `source`."""
        q, kv = self.convolved(self.q, x[:, :, None]), self.convolved(self.kv, source[:, :, None])
        k, v = kv.chunk(2, dim=2)
        return Tokens(q, k, v, x, keep)

    def conclude(self, out: Tensor, x: Tensor) -> Tensor:
        """The convolution of what heads read."""
        return self.proj_drop(self.convolved(self.proj, unflatten(out, -1, (self.num_heads, self.dim)))[:, :, 0])

    def convolved(self, conv: nn.Module, x: Tensor) -> Tensor:
        """`conv` of the maps that tokens `(B, N, maps, C)` are: `(B, N, more maps, C)`."""
        batch, count = x.shape[:2]
        maps = copied(unflatten(x.flatten(0, 1), -1, self.core.map_size))
        return unflatten(conv(maps).flatten(2), 0, (batch, count))


@register(
    "convshare",
    formula="o_i = b + sum_h conv_oh(sum_j softmax_j(C^(-1/2) q_ih . k_jh) v_jh), q_ih = conv_qh(x_i) of x_i as a map",
    latex=r"o_i = b + \sum_h \mathrm{conv}_{oh} \left( \sum_j \mathrm{softmax}_j(C^{-1/2} q_{ih} \cdot k_{jh}) v_{jh} "
    r"\right), \quad [q_{ih}, k_{ih}, v_{ih}] = \mathrm{conv}_{h}(x_i)",
    family="convolution",
    complexity="O(N^2 H d)",
    paper=Paper(
        "ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space Optical "
        "Accelerators",
        "2504.11517",
    ),
)
class ConvShare(Softmax):
    """Scaled dot-product attention of tokens that convolutions have projected.

    Args:
        kernel_size: the side of kernels, odd.
        map_size: height and width of the map that a token is; None for what is nearest to a square.
        causal: token i sees tokens j <= i only.
    """

    structure = Softmax.structure._replace(reduced=False)
    turns = ""  # type: ignore[assignment]
    projections = "none"  # but those of its layer
    layer = SharedConvs

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int = 3,
        map_size: tuple[int, int] | None = None,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, device=device, dtype=dtype)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise LinsightError(f"kernel_size={kernel_size} of 'convshare' must be odd, so that it has a middle")
        side = next(side for side in range(math.isqrt(dim), 0, -1) if dim % side == 0)
        self.kernel_size = kernel_size
        self.map_size: tuple[int, int] = (side, dim // side) if map_size is None else (map_size[0], map_size[1])
        if min(self.map_size) < 1 or math.prod(self.map_size) != dim:
            raise LinsightError(f"map_size={map_size} of 'convshare' is not a map of the {dim} channels of a token")
        self.out_dim = dim * num_heads

    def extra_repr(self) -> str:
        """Shown by `print(layer)`."""
        return f"{super().extra_repr()}, map_size={self.map_size}"
