"""Blocks without an MLP, as of state-space models: x + mixer(RMSNorm(x))."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from linsight.attention import Node, Rename
from linsight.attention.parts.wide import WideRMSNorm
from linsight.ops import LayoutLike, as_layout

from ..plan import Choice
from ..seams import make_block, make_layer


class Mixer(Node):
    """The block around a layer."""

    eps: ClassVar[float] = 1e-5  # of norms
    published = (Rename("mixer.", "attn."), Rename("norm.", "norm1."))

    def __init__(self, dim: int, attn: nn.Module, drop_path: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.norm1 = WideRMSNorm(dim, eps=self.eps, **factory)
        self.attn = attn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: LayoutLike, keep: Tensor | None = None) -> Tensor:
        """`x` `(B, P + H*W, C)`, which lies as `layout` says; the shape is kept."""
        return x + self.drop_path(self.attn(self.norm1(x), as_layout(layout), keep=keep))


def mixers(
    choices: Sequence[Choice],
    dim: int,
    num_heads: int,
    *,
    grid: tuple[int, int],
    drop_path_rate: float = 0.0,
    **factory: Any,
) -> nn.ModuleList:
    """The blocks of a model, or, of a mechanism that is a whole block, that; stochastic depth grows from 0."""
    rates = torch.linspace(0, drop_path_rate, len(choices), device="cpu").tolist()
    blocks = []
    for choice, rate in zip(choices, rates, strict=True):
        shared: dict[str, Any] = {"grid": grid, **factory}
        whole = make_block(choice, dim, num_heads, drop_path=rate, **shared)
        blocks.append(whole or Mixer(dim, make_layer(choice, dim, num_heads, **shared), rate, **factory))
    return nn.ModuleList(blocks)
