"""Inner models that are trained for one step while they are used: forward, closed-form gradients, the step.

Sun et al., "Learning to (Learn at Test Time)", arXiv 2407.04620; the vision forms of ViT^3 (arXiv 2512.01643) and
T5 (arXiv 2605.02772). Axes: B batch, N tokens, H heads, D head width, M matrices of a model.

An inner model f maps a token u of one head to D values. With matrices W of D x D, multiplied from the right,

    a(u) = SiLU(u W_gate) * (u W_other),   f(u) = a(u)  or  a(u) W_last,

where a model may lack W_other and W_last. Its loss over the tokens is -f(k).v ("dot") or |f(k) - v|^2 / 2 ("mse"),
times s/N. The gradients below are written as plain sums over tokens of products: those of two tiles add up, and
s/N comes once, behind the sum, where half precision would have rounded it away. Ordinary autograd goes through them.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import Tile
from .sizes import unflatten
from .states import accumulator, apply_state, full_precision, mask_tokens, outer_sum

InnerLoss = Literal["dot", "mse"]


class InnerModel(NamedTuple):
    """An inner model.

    first: how many matrices meet u.  gate: which of them SiLU takes.  last: whether another follows.
    """

    first: int
    gate: int
    last: bool

    @property
    def matrices(self) -> int:
        """M. They travel side by side, `(B or 1, H, D, M * D)`: tokens meet the first ones in one product."""
        return self.first + self.last


INNER_MODELS: dict[str, InnerModel] = {
    "swiglu": InnerModel(first=2, gate=1, last=False),  # (u W1) * SiLU(u W2)
    "swiglu3": InnerModel(first=2, gate=0, last=True),  # (SiLU(u W1) * (u W2)) W3
    "mlp2": InnerModel(first=1, gate=0, last=True),  # SiLU(u W1) W2
}


class InnerGradient(NamedTuple):
    """A gradient. total: the sum over tokens, of the loss without s/N.  tokens: `(B,)` how many."""

    total: Tensor
    tokens: Tensor


def inner_forward(model: InnerModel, u: Tensor, w: Tensor) -> Tensor:
    """f(u), `(B, N, H, D)` -> the same; `w` `(B or 1, H, D, M * D)`. Computed in the dtype of `w`."""
    with full_precision(u):
        u = u.to(w.dtype)
        first, last = _split(model, w)
        z = _project(model, u, first)
        a = _hidden(model, z, F.silu(z[model.gate]))
        return a if last is None else apply_state(a, last)


def inner_gradient(
    model: InnerModel, loss: InnerLoss, k: Tensor, v: Tensor, w: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Gradients by the matrices of the loss on tokens `k`, `v` `(B, N, H, D)`, summed: `(B, H, D, M * D)`.

    `w` `(1, H, D, M * D)`, in the accumulator's dtype, in which all is computed. Tokens that are not kept add nothing.
    """
    with full_precision(v):
        k, v = mask_tokens(k, keep).to(w.dtype), mask_tokens(v, keep).to(w.dtype)
        first, last = _split(model, w)
        z = _project(model, k, first)
        gate = z[model.gate]
        slope = torch.sigmoid(gate)
        active = gate * slope
        slope = slope * (1 + gate - active)  # the derivative of SiLU
        e, a = -v, _hidden(model, z, active) if model.last or loss == "mse" else None
        if loss == "mse":
            assert a is not None
            e = mask_tokens((a if last is None else apply_state(a, last)) - v, keep)
        by_a = e if last is None else apply_state(e, last.transpose(-1, -2))
        by_z = [by_a * slope]
        if model.first == 2:
            by_z = [by_a * active] * 2
            by_z[model.gate] = by_a * slope * z[1 - model.gate]
        by_first = outer_sum(k, torch.cat(by_z, dim=-1))
        return by_first if a is None or last is None else torch.cat([by_first, outer_sum(a, e)], dim=-1)


def kernel_gradient(k: Tensor, v: Tensor, tile: Tile, side: int = 3) -> Tensor:
    """The gradient of -(w * k).v by a depthwise kernel w: minus the sum of k(p + tap) v(p) over p.

    `k`, `v` `(B, n, C)` are the grid tokens that `tile` sees, zero where nothing is to be learnt; p runs over its own.
    Returns `(B, C, side, side)`.
    """
    pad, dtype = side // 2, accumulator(v.dtype)
    canvas = F.pad(unflatten(k.to(dtype), 1, tile.seen), (0, 0, pad, pad, pad, pad))
    v = unflatten(tile.inner_grid(v.to(dtype)), 1, (tile.height, tile.width))
    top, left = tile.top - tile.rows[0], tile.left - tile.columns[0]
    taps = [
        (canvas[:, y : y + tile.height, x : x + tile.width] * v).sum(dim=(1, 2))
        for y in range(top, top + side)
        for x in range(left, left + side)
    ]
    return -unflatten(torch.stack(taps, dim=-1), -1, (side, side))


def inner_step(w: Tensor, gradient: InnerGradient, *, scale: float, rate: float, clip: tuple[int, ...] = ()) -> Tensor:
    """w - rate * g, g the gradient of the loss with `scale`/N; with `clip`, g / (1 + its norm over those axes)."""
    share = scale / gradient.tokens.clamp(min=1)
    g = gradient.total * share.reshape(-1, *[1] * (gradient.total.ndim - 1))
    if clip:
        g = g / (torch.linalg.vector_norm(g, dim=clip, keepdim=True) + 1)
    return w.to(g.dtype) - rate * g


def _split(model: InnerModel, w: Tensor) -> tuple[Tensor, Tensor | None]:
    """The matrices that tokens meet, side by side, and the one behind them."""
    width = model.first * w.shape[-2]
    return w[..., :width], w[..., width:] if model.last else None


def _project(model: InnerModel, u: Tensor, first: Tensor) -> tuple[Tensor, ...]:
    return apply_state(u, first).chunk(model.first, dim=-1)


def _hidden(model: InnerModel, z: tuple[Tensor, ...], active: Tensor) -> Tensor:
    """a(u), of `active` = SiLU(u W_gate)."""
    return active * z[1 - model.gate] if model.first == 2 else active
