"""Blocks that add each branch in place, and MLPs that write GELU over its input, the widest tensor of a block."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from linsight.models.hosts.cswin import CSwinBlock
from linsight.models.hosts.h_vit import HViTBlock
from linsight.models.hosts.mlla import MLLABlock
from linsight.models.hosts.ravlt import NaLaBlock, RAVLTBlock
from linsight.models.hosts.swin import SwinBlock
from linsight.models.hosts.vit.blocks import Block
from linsight.models.parts.stages import PreNorm

from .form import form_of


def add_into(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, written over the branch, which a linear map has just made."""
    if torch.compiler.is_compiling() or branch.requires_grad or x.requires_grad or x.dtype != branch.dtype:
        return x + branch
    if x.shape != branch.shape or 0 in branch.stride():  # expanded: many places are one in memory
        return x + branch
    return branch.add_(x)


def block_form(block: nn.Module) -> nn.Module:
    """The block, whose sums are made in place."""
    return form_of(block, type(block), add=add_into)


class InPlaceMlp(Mlp):
    """timm's MLP, GELU in place."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C)`; the shape is kept."""
        hidden = self.fc1(x)
        if hidden.requires_grad:
            return self.fc2(self.norm(self.act(hidden)))
        return self.fc2(self.norm(torch.ops.aten.gelu_(hidden, approximate=self.act.approximate)))


def mlp_form(mlp: Mlp) -> nn.Module:
    """The MLP with GELU in place, where it has a GELU."""
    return form_of(mlp, InPlaceMlp if type(mlp.act) is nn.GELU else type(mlp))


BLOCK_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    **dict.fromkeys((PreNorm, CSwinBlock, MLLABlock, HViTBlock, RAVLTBlock, NaLaBlock, SwinBlock, Block), block_form),
    Mlp: mlp_form,
}
