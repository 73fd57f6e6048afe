"""Tokens: all that a mechanism sees of an image."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Tokens as a mechanism sees them. q `(B, M, H, D)`; k `(B, N, H, D)`; v `(B, N, H, E)`, head-major channels.

    x: `(B, M, C)` the layer's input, which queries were projected from.
    keep: `(B, N)` bool, False where a key is not to be seen; None when all are.
    extra: `(B, N, core.extra_dim)`, further projected channels, for a core that asks for them.
    residual: `(B, M, C)` the residual stream before the norm, for a core that reads it, where the host gives it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor | None = None
    keep: Tensor | None = None
    extra: Tensor | None = None
    residual: Tensor | None = None

    def each(self, take: Callable[[Tensor], Tensor]) -> "Tokens":
        """The tokens after `take`, applied to every field that there is."""
        return Tokens(*(None if t is None else take(t) for t in self))  # type: ignore[arg-type]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(B, N, C)` -> `(B, N, H, C / H)`, head-major channels."""
    return x.view(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: Tensor) -> Tensor:
    """`(B, N, H, D)` -> `(B, N, H * D)`."""
    return x.flatten(-2)
