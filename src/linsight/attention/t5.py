"""T5 (Transformer to TTT): layers that take the place of softmax attention in a pretrained model.

"Linearizing Vision Transformer with Test-Time Training", ICML 2026 (arXiv 2605.02772). q, k, v and the output
projection are those of softmax attention, names included, so a softmax checkpoint loads into a model of these layers
with `strict=False`. Keys are normed for each image and channel over the N tokens, as softmax ignores a shift of all
keys and the inner loss does not; queries and normed keys see their neighbours through depthwise 3x3 convolutions:

    q' = q + conv(q),   n = (k - mean k) / sqrt(var k + 1),   k' = n + conv(n)

Each head then takes one step of its inner model f on (k', v) and answers q', with s = d^(-1/2), no clip:

    classification   f(u) = (SiLU(u W1) * (u W2)) W3   -(s/N) sum f(k').v
    ablation "v0"    f(u) = SiLU(u W1) W2              -(s/N) sum f(k').v, no convolutions
    DiT5             f(u) = SiLU(u W1) W2              (s/2N) sum |f(k') - v|^2

DiT5 is used in equal parts with softmax attention in 5x5 windows of the raw q, k, v, and q and k of its inner model
have a learnt scale and shift a channel. Prefix tokens, of which neither publication has any, are normed, train and
are answered as all others; the convolutions pass them by. DiT5 refuses them: they have no neighbours.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from linsight.ops import (
    State,
    Tile,
    accumulator,
    depthwise_conv,
    full_precision,
    mask_tokens,
    neighbourhood_attention,
    pad_prefix,
)

from ._core import Capabilities, Rename, Tokens
from ._inner import InnerTraining
from ._registry import Paper, register

_PAPER = Paper("Linearizing Vision Transformer with Test-Time Training", "2605.02772", "ICML 2026")


@register(
    "t5",
    formula="o = f_W'(q + conv(q)), W' = W - dL/dW, L = -(s/N) sum f_W(n + conv(n)).v, n = instance_norm(k)",
    complexity="O(N d^2)",
    paper=_PAPER,
)
class T5(InnerTraining):
    """One inner step a head on normed keys, with convolutions on queries and keys.

    Args:
        inner_model: f. "swiglu3" is (SiLU(u W1) (u W2)) W3, "mlp2" SiLU(u W1) W2.
        loss: -f(k).v or |f(k) - v|^2 / 2.
        local: the convolutions.
    """

    capabilities = Capabilities(keep=True, sizes=True, reduced=True, stream=True, prefix=True)
    halos: tuple[int, ...] = (0, 1, 1)
    published: ClassVar[tuple[Rename, ...]] = (
        Rename("w1", "core.w1"),
        Rename("w2", "core.w2"),
        Rename("w3", "core.w3"),
        Rename("q_conv2d.", "core.q_conv."),
        Rename("k_conv2d.", "core.k_conv."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        inner_model: Literal["swiglu3", "mlp2"] = "swiglu3",
        loss: Literal["dot", "mse"] = "dot",
        local: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        heads: dict[str, Any] = {"inner_model": inner_model, "loss": loss, "inner_lr": 1.0, "scale": None}
        super().__init__(dim, num_heads, **heads, key_norm=True, clip=False, **factory)
        self.local = local
        if local:
            self.q_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
            self.k_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        else:
            self.halos = (0, 0, 0)

    def localise(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """x + conv(x) on the grid; the convolution sees zeros where nothing is kept."""
        if not self.local:
            return x
        conv = self.q_conv if name == "q" else self.k_conv
        assert conv.bias is not None
        with full_precision(x):
            weight, bias = conv.weight.to(x.dtype), conv.bias.to(x.dtype)
            return x + pad_prefix(depthwise_conv(x[:, tile.prefix :], tile.seen, weight, bias), tile.prefix)


@register(
    "dit5",
    formula="o = (softmax(s q K^T) V over 5x5 windows + t5(a q + b, a' k + b', v)) / 2, f(u) = SiLU(u W1) W2",
    complexity="O(N d^2)",
    paper=_PAPER,
)
class DiT5(T5):
    """T5's two-layer inner model under a squared loss, mixed half and half with attention in 5x5 windows.

    Windows are shifted inward at the rim, so that each query sees 25 keys (all of a side shorter than 5).
    """

    capabilities = Capabilities(sizes=True, stream=True)  # a dropped token leaves a hole in the windows, not fewer keys
    window: ClassVar[int] = 5
    halos: tuple[int, ...] = (0, 1, window - 1)
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
        # (..., 0) of queries, (..., 1) of keys
        self.qk_scale = nn.Parameter(torch.ones(1, 1, dim, 2, device=device, dtype=dtype))
        self.qk_offset = nn.Parameter(torch.zeros(1, 1, dim, 2, device=device, dtype=dtype))

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """Both ways, in equal parts."""
        q, k, v = (mask_tokens(x, tokens.keep) for x in tokens[:3])
        near = neighbourhood_attention(q, k, v, tile, self.window)
        return ((self.answer(tokens, tile, done[-1]) + near) / 2).to(tokens.q.dtype)

    def prepare(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """The learnt scale and shift."""
        x, i = x.to(accumulator(x.dtype)), "qk".index(name)
        return x * self.qk_scale[..., i].to(x.dtype) + self.qk_offset[..., i].to(x.dtype)
