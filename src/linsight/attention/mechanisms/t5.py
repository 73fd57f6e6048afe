"""T5 (Transformer to TTT): layers that take the place of softmax attention in a pretrained model.

"Linearizing Vision Transformer with Test-Time Training", ICML 2026 (arXiv 2605.02772). q, k, v and the output
projection are those of softmax attention, names included, so a softmax checkpoint loads into a model of these layers
with `strict=False`. Keys are normed for each image and channel over the N tokens, as softmax ignores a shift of all
keys and the inner loss does not; queries and normed keys see their neighbours through depthwise 3x3 convolutions:

    q' = q + conv(q),   n = (k - mean k) / sqrt(var k + 1),   k' = n + conv(n)

Each head then takes one step of its inner model f on (k', v) and answers q', with s = d^(-1/2), no clip:

    published        f(u) = (SiLU(u W1) * (u W2)) W3   -(s/N) sum f(k').v
    ablation "v0"    f(u) = SiLU(u W1) W2              -(s/N) sum f(k').v, no convolutions

Prefix tokens, of which the publication has none, are normed, train and are answered as all others; the convolutions
pass them by. The form for diffusion models is `dit5`.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from linsight.ops import Tile, pad_prefix

from ..capabilities import Capabilities, Structure
from ..core import Rename
from ..parts.inner import InnerStep, InnerTraining
from ..parts.token_conv import TokenConv
from ..registry import Paper, register


@register(
    "t5",
    formula="o = f_W'(q + conv(q)), W' = W - dL/dW, L = -(s/N) sum f_W(n + conv(n)).v, n = instance_norm(k)",
    latex=r"\begin{aligned} o &= f_{W'}(q'), \quad f_W(u) = (\mathrm{SiLU}(u W_1) \odot u W_2) W_3 \cr "
    r"W' &= W + \nabla_W \frac{s}{N} \sum_n f_W(k'_n) \cdot v_n, \quad s = d^{-1/2} \cr "
    r"q' &= q + \mathrm{conv}(q), \quad k' = n + \mathrm{conv}(n), \quad n = \frac{k - "
    r"\mathrm{mean}(k)}{\sqrt{\mathrm{var}(k) + 1}} \end{aligned}",
    family="inner weights",
    complexity="O(N d^2)",
    paper=Paper("Linearizing Vision Transformer with Test-Time Training", "2605.02772", "ICML 2026"),
)
class T5(InnerTraining):
    """One inner step a head on normed keys, with convolutions on queries and keys.

    Args:
        inner_model: f. "swiglu3" is (SiLU(u W1) (u W2)) W3, "mlp2" SiLU(u W1) W2.
        loss: -f(k).v or |f(k) - v|^2 / 2.
        local: the convolutions.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
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
        super().__init__(dim, num_heads, **heads, step=InnerStep(halo=int(local)), key_norm=True, clip=False, **factory)
        self.local, self.halo = local, int(local)
        if local:
            self.q_conv = TokenConv(dim, **factory)
            self.k_conv = TokenConv(dim, **factory)

    def localise(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """x + conv(x) on the grid; the convolution sees zeros where nothing is kept."""
        if not self.local:
            return x
        conv = self.q_conv if name == "q" else self.k_conv
        return x + pad_prefix(conv(x[:, tile.prefix :], tile.seen, wide=True), tile.prefix)
