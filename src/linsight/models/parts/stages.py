"""Stages of hierarchical hosts: their sizes, a pre-norm block, blocks behind a downsampling."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.layers import DropPath, trunc_normal_
from timm.models._manipulate import checkpoint
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

from linsight.attention import Node
from linsight.ops import Grid, Tile, unflatten

from ..seams import init_own, set_grid
from .convs import ConvMlp


class StageSize(NamedTuple):
    """A stage of a host: its width, blocks and heads, and where the host has them, how much wider the hidden layer
    of an MLP is, and by what keys are reduced (or how wide stripes are). No heads, in a host that has such stages: no
    attention.
    """

    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    reduction: int = 1


def init_linear(module: nn.Module) -> None:
    """The published initial weights of a linear layer; to a mechanism, around its linear layers, those of its own."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        init_own(module)


def init_conv(module: nn.Module) -> None:
    """The published initial weights of a convolution, where they are drawn as those of a linear layer."""
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class PreNorm(Node):
    """x + attn(LN(x)), then x + mlp(LN(x)), on tokens. `mlp` is given the grid too where it has a convolution."""

    gives_residual = False  # hands the layer x before the norm

    def __init__(
        self, dim: int, attn: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, eps: float = 1e-5, **factory: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps, **factory)
        self.mlp = mlp
        self.mlp_on_grid = isinstance(mlp, MlpWithDepthwiseConv | ConvMlp)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, P + H*W, C)`; the shape is kept."""
        return self.add_mlp(self.add_attention(x, grid), grid)

    def add_attention(self, x: Tensor, grid: Grid) -> Tensor:
        """The first half."""
        return self.add(x, self.attn(self.norm1(x), grid, residual=x if self.gives_residual else None))

    def add_mlp(self, x: Tensor, grid: Grid) -> Tensor:
        """The second half."""
        inner = self.norm2(x)
        return self.add(x, self.mlp(inner, grid) if self.mlp_on_grid else self.mlp(inner))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The sum, in training without the branches of some images."""
        return x + self.drop_path(branch)


class Stage(nn.Module):
    """Blocks on the tokens that `downsample` makes of a map. Hosts add what comes between."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Move what lies on the grid of this stage to another one."""
        set_grid(self.blocks, grid)

    def place(self, x: Tensor, tile: Tile) -> Tensor:
        """The tokens `(B, n, C)` that `downsample` makes, of a tile of their grid, with a position table."""
        return x

    def prefix_tokens(self) -> Tensor | None:
        """`(1, P, C)`, tokens in front of those of the map."""
        return None

    def mixes(self) -> list[nn.Module]:
        """The modules that `run` calls, in their order, each with tokens and their grid."""
        return list(self.blocks)

    def tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """A map to tokens `(B, P + H*W, C)` after all blocks, and their grid."""
        return self.run(*self.downsample(x))

    def run(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The blocks alone."""
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x, grid

    def forward(self, x: Tensor) -> Tensor:
        """Maps in and out, `(B, C, H, W)`."""
        x, grid = self.tokens(x)
        return as_map(x, grid)


def as_map(x: Tensor, grid: Grid) -> Tensor:
    """Tokens `(B, P + H*W, C)` -> `(B, C, H, W)`, without the prefix."""
    return unflatten(x[:, grid.prefix :].transpose(1, 2), 2, (grid.height, grid.width))
