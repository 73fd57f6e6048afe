"""Queries and keys with the feature map that is to be applied when they are read.

Axes: B batch, N tokens, H heads, D head width. The map is data, so that a fused form can apply it to what it reads:

    phi(x)_nc = after_n (before_n column_c g(x_nc))^power

with g one of `FEATURE_MAPS`, and each factor optional. Where there is a rotation, products with values see phi(x)
turned by its place, and normalisers phi(x) as it is. Moments, of which nothing is a normaliser, see it turned.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import fused_form
from .maps import FEATURE_MAPS
from .rotary import Turn
from .sizes import unflatten
from .states import full_precision, widened


class Features(NamedTuple):
    """x: `(B, N, H, D)`, unmapped, of any strides.  map: the name of g.  power: 1 for none.

    column: `(H, D)`.  before: `(B, N)`, a constant for autograd.  after: `(B, N)`.  turn: of these tokens.
    """

    x: Tensor
    map: str = "identity"
    power: float = 1.0
    column: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    turn: Turn | None = None

    def part(self, images: slice, tokens: slice) -> "Features":
        """The features of some tokens of some images."""
        x, before, after = (None if t is None else t[images, tokens] for t in (self.x, self.before, self.after))
        assert x is not None
        turn = None if self.turn is None else self.turn.part(tokens)
        return self._replace(x=x, before=before, after=after, turn=turn)

    def mapped(self) -> Tensor:
        """phi(x) `(B, N, H, D)`, in the accumulator's dtype."""
        y = widened(self.x)
        with full_precision(y):
            if self.map != "identity":
                y = FEATURE_MAPS[self.map](y)
            if self.column is not None:
                y = y * self.column
            if self.before is not None:
                y = y * self.before[..., None, None]
            if self.power != 1:
                y = y**self.power
            return y if self.after is None else y * self.after[..., None, None]

    def turned(self, mapped: Tensor) -> Tensor:
        """`mapped` as products with values see it: turned, where there is a rotation."""
        if self.turn is None:
            return mapped
        return unflatten(self.turn.rotate(mapped.flatten(2)), 2, mapped.shape[2:])


def as_features(x: "Features | Tensor") -> Features:
    """A tensor is its own feature."""
    return x if isinstance(x, Features) else Features(x)


def focus(x: Tensor, column: Tensor, power: float) -> Features:
    """|u| u^p / |u^p| of u = (relu(x) + 1e-6) column: it keeps the norm, and turns to the largest channels.

    `x` `(B, N, H, D)`, `column` `(H, D)`; norms are over all heads of a token. The power is taken of u / max(u), which
    is the same function and can neither overflow nor vanish. Han et al., FLatten (arXiv 2308.00442), equation 5.
    """
    fused = fused_form("focus", x)
    if fused is not None:
        return fused(x, column, power)
    x = widened(x)
    with full_precision(x):
        u = FEATURE_MAPS["positive"](x) * column
        top = u.detach().amax(dim=(-2, -1), keepdim=True)  # cancels, so no gradient passes through it
        w = u / top
        powered = w**power
        length = _norm(w) / _norm(powered) * top
        return Features(powered * length)


def square_features(x: Tensor) -> Tensor:
    """Features `(..., F)` of `x` `(..., D)` with phi(q) . phi(k) = (q . k)^2 / 2: the products of two channels.

    Channels are a circle, and pairs come by their distance on it, each once; at half the circle, which even D have,
    they come twice. So F = D (D / 2 + 1) for even D, D (D + 1) / 2 for odd ones. All second
    factors are one view of the circle.
    """
    width = x.shape[-1]
    distance = torch.arange(width // 2 + 1, device=x.device)[:, None]
    weight = 1 - (1 - 0.5**0.5) * ((distance == 0) | (2 * distance == width)).to(x.dtype)
    others = torch.cat([x, x[..., : width // 2]], dim=-1).unfold(-1, width, 1)  # (..., distances, D)
    return (x[..., None, :] * (others * weight)).flatten(-2)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(2), dim=-1)[..., None, None]
