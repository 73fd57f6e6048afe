"""Test-time-training attention of ViT^3: a two-branch inner model takes one step on (k, v), then answers q.

Han et al., "ViT^3: Unlocking Test-Time Training in Vision", CVPR 2026 (arXiv 2512.01643). One projection of x gives
q1, k1, v1 (C channels each) and q2, k2, v2 (d = C / heads each). Each head trains

    f(u) = (u W1) * SiLU(u W2)   on (k1, v1)

and one further head of width d trains a depthwise 3x3 kernel w on the images k2, v2 of its channels. Both losses are
-(s/N) sum_n f(k_n).v_n, s = 1/3 in both, N the tokens that the branch trains on; gradients are clipped softly,
g / (|g| + 1) with a norm for each column of a matrix and each kernel, and the step is W' = W - lr g. Then

    o = [(q1 W1') * SiLU(q1 W2'),  conv(q2; w')],

C + d channels. Queries and keys are not normalised. Prefix tokens, of which the publication has none, train and are
answered by the heads; they have no place on the grid, so the convolution neither sees them nor adds to them.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import (
    InnerGradient,
    Tile,
    accumulator,
    check_rotary,
    count_tokens,
    dynamic_depthwise_conv,
    kernel_gradient,
    mask_tokens,
    pad_prefix,
    rotate,
)

from ..capabilities import Capabilities, Structure
from ..core import Rename
from ..parts.inner import InnerStep, InnerTraining
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens


class TTTState(NamedTuple):
    """The sums of the heads, and those of the convolution."""

    heads: InnerGradient
    kernels: InnerGradient


class Trained(NamedTuple):
    """heads: `(B, H, D, M * D)`.  kernels: `(B, D, 3, 3)`."""

    heads: Tensor
    kernels: Tensor


class BothSteps(InnerStep):
    """The step of the heads, and that of the convolution beside them."""

    def absorb(self, core: Any, tokens: Tokens, tile: Tile, done: Done) -> TTTState:
        """The sums of both branches."""
        heads = super().absorb(core, tokens, tile, done)
        _, k, v = images(tokens, tile)
        keep = None if tokens.keep is None else tile.inner_grid(tokens.keep[:, tile.prefix :])
        return TTTState(heads, InnerGradient(kernel_gradient(k, v, tile), count_tokens(tile.inner_grid(v), keep)))

    def finish(self, core: Any, state: TTTState, done: Done) -> Trained:
        """The trained matrices and kernels."""
        w = core.kernel.transpose(0, 1).to(state.kernels.total.dtype)
        return Trained(super().finish(core, state.heads, done), core.trained(w, state.kernels, -2, -1))


def images(tokens: Tokens, tile: Tile) -> tuple[Tensor, ...]:
    """q2, k2, v2 of what `tile` sees of the grid, each `(B, n, D)`, zero where a token is not kept."""
    if tokens.extra is None:
        raise LinsightError("the convolution of 'ttt' needs projections='qkvx'; others go with conv=False")
    return mask_tokens(tokens.extra, tokens.keep)[:, tile.prefix :].chunk(3, dim=-1)


@register(
    "ttt",
    formula="o = [f_W'(q1), conv3x3(q2; w')], W' = W - lr clip(dL/dW), L = -(s/N) sum f_W(k).v",
    latex=r"\begin{aligned} o &= [f_{W'}(q_1), \mathrm{conv}_{3 \times 3}(q_2; w')], \quad f_W(u) = u W_1 \odot "
    r"\mathrm{SiLU}(u W_2) \cr "
    r"W' &= W - \mathrm{lr} \frac{g}{\lVert g \rVert + 1}, \quad g = - \nabla_W \frac{s}{N} \sum_n "
    r"f_W(k_{1,n}) \cdot v_{1,n} \cr "
    r"w' &= w - \mathrm{lr} \frac{h}{\lVert h \rVert + 1}, \quad h = - \nabla_w \frac{s}{N} \sum_n "
    r"\mathrm{conv}_{3 \times 3}(k_2; w)_n \cdot v_{2,n} \end{aligned}",
    family="inner weights",
    also=("ViT^3", "ViTTT"),
    complexity="O(N d^2)",
    paper=Paper("ViT^3: Unlocking Test-Time Training in Vision", "2512.01643", "CVPR 2026"),
)
class TTT(InnerTraining):
    """One inner step of a model a head, and of a depthwise convolution beside them.

    Args:
        inner_model: f. "swiglu" is (u W1) SiLU(u W2), "swiglu3" (SiLU(u W1) (u W2)) W3, "mlp2" SiLU(u W1) W2.
        loss: of the heads, -f(k).v or |f(k) - v|^2 / 2. The convolution's is always the first.
        key_norm: "instance" takes from each key channel its mean over the tokens, and divides by sqrt(variance + 1).
        clip: soft clipping of the gradients. Without it the step grows with the cube of the activations.
        conv: the convolution's head. Every published model has it.
        rotary: turn q1 and k1 by their positions, over all channels before heads are split, as hierarchical models do.
        inner_lr: lr.
        scale: s; None is d^(-1/2). Every published model uses 1/3.
    """

    capabilities = Capabilities(keep=True, sizes=True, prefix=True)
    structure = Structure(stream=True)
    projections = "qkvx"
    published = (
        Rename("w1", "core.w1"),
        Rename("w2", "core.w2"),
        Rename("w3", "core.kernel"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        inner_model: Literal["swiglu", "swiglu3", "mlp2"] = "swiglu",
        loss: Literal["dot", "mse"] = "dot",
        key_norm: Literal["none", "instance"] = "none",
        clip: bool = True,
        conv: bool = True,
        rotary: bool = False,
        inner_lr: float = 1.0,
        scale: float | None = 1 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm, width, step = key_norm == "instance", dim // num_heads, BothSteps(halo=1) if conv else InnerStep()
        heads: dict[str, Any] = {"inner_model": inner_model, "loss": loss, "step": step, "key_norm": norm, "clip": clip}
        super().__init__(dim, num_heads, **heads, inner_lr=inner_lr, scale=scale, **factory)
        if rotary:
            check_rotary(dim)
        self.rotary = rotary
        self.halo = step.halo
        self.kernel: nn.Parameter | None = None
        if conv:
            self.kernel = nn.Parameter(torch.empty(width, 1, 3, 3, **factory))
            nn.init.trunc_normal_(self.kernel, std=0.02)
            self.extra_dim, self.out_dim = 3 * width, dim + width

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The trained model on q1, and behind its heads the trained convolution on q2."""
        if self.kernel is None:
            return super().read(tokens, tile, done)
        out = self.answer(tokens, tile, done[-1].heads)
        local = dynamic_depthwise_conv(images(tokens, tile)[0], tile.seen, done[-1].kernels)
        local = tile.inner_grid(local)
        return torch.cat([out, pad_prefix(local, tile.prefix)[:, :, None]], dim=2).to(tokens.q.dtype)

    def prepare(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """Turned by their positions, where asked."""
        return rotate(x, tile) if self.rotary else x.to(accumulator(x.dtype))
