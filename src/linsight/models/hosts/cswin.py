"""The CSwin host: Dong et al., "CSWin Transformer", CVPR 2022 (arXiv 2107.00652).

Four stages of pre-norm blocks on tokens, each behind an overlapping convolution (7x7 of stride 4, then 3x3
of stride 2) and LayerNorm; no position table. A mechanism of quadratic cost has the host's stripes: half the
heads see vertical ones (H x split), the other half horizontal ones (split x W), but for the last stage and
grids that are not larger than a stripe, which are seen whole. The others see the whole grid with all heads.
Beside the mechanism stands LePE, a 3x3 depthwise convolution of v inside the stripe, and what the mechanism
is conditioned on is the residual stream before the norm.

Any image size: the first stride rounds to the nearest, the others upwards; a stripe that reaches over the rim
is padded, and the padding is never absorbed. The stripes are those that the model is built for (`img_size`):
at another size their width and number of heads stay.
"""

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from linsight.attention import (
    Core,
    Rename,
    TokenConv,
    Tokens,
    create_core,
    mechanism,
    merge_heads,
    require,
    split_heads,
)
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout, Partition, unflatten

from ..parts.convs import ConvEmbed
from ..parts.pyramid import PlainPyramid
from ..parts.stages import PreNorm, StageSize
from ..plan import Choice
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host, figures
from ..seams import make_layer

Sizes = tuple[int | None, int | None]


def inner(sizes: Sizes | None, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a stripe of a grid, or of the grid where there is none."""
    return grid if sizes is None else Partition(Grid(*grid), sizes).inner[:2]


class Branch(nn.Module):
    """A mechanism, on all of the grid or on stripes of it, whose `sizes` are those of a `Partition`, and LePE."""

    published = (Rename("get_v.", "lepe."),)

    def __init__(
        self, core: Core, dim: int, *, sizes: Sizes | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.core = core
        self.lepe = TokenConv(dim, device=device, dtype=dtype)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Move the mechanism's tables to those of another grid."""
        self.core.set_grid(inner(self.sizes, grid))

    def forward(self, qkv: Tensor, grid: Grid, x: Tensor) -> Tensor:
        """`qkv` `(B, H*W, 3, C)` and `x` `(B, H*W, C)`, the residual stream or what was projected -> `(B, H*W, C)`."""
        if self.sizes is None:
            return self._mix(qkv, grid, x, None)
        stripes = Partition(grid, self.sizes)
        keep = stripes.keep(qkv)
        if keep is not None:
            width = max(size for size in self.sizes if size)
            require(self.core, "keep", f"a grid that stripes of {width} do not divide")
        return stripes.join(self._mix(stripes.cut(qkv), stripes.inner, stripes.cut(x), keep))

    def _mix(self, qkv: Tensor, grid: Grid, x: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = qkv.unbind(2)
        heads: int = self.core.num_heads  # type: ignore[assignment]
        tokens = Tokens(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads), x, keep)
        out = merge_heads(self.core(tokens, Layout(grid)))
        return out + self.lepe(v, (grid.height, grid.width), varies=self.sizes is not None)


class CrossShapedAttention(nn.Module):
    """Projections around one branch for the whole grid or, with `split`, two with half the heads each.

    The first has vertical stripes of `split` columns, the second horizontal ones. `grid`: see `create_core`.
    in_parts: keys of tensors that lie in a part for each branch, as many as the size of images asks for.
    """

    # Also of a branch that is not here: a file of another size may have it.
    published = tuple(Rename(f"branches.{i}.get_v.", f"branches.{i}.lepe.") for i in range(2))
    in_parts = ("branches.{}.lepe.weight", "branches.{}.lepe.bias")

    def __init__(
        self,
        choice: Choice,
        dim: int,
        num_heads: int,
        *,
        grid: tuple[int, int],
        split: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        cuts: list[Sizes | None] = [None] if split is None else [(None, split), (split, None)]
        if num_heads < 1 or dim % num_heads or num_heads % len(cuts):
            halves = f", and be even where two kinds of stripes (of {split}) share the heads" if split else ""
            raise LinsightError(f"num_heads={num_heads} must divide dim={dim}{halves}")
        dims, heads = dim // len(cuts), num_heads // len(cuts)
        self.qkv = nn.Linear(dim, 3 * dim, **factory)
        self.branches = nn.ModuleList()
        for sizes in cuts:
            place = inner(sizes, grid)
            core = create_core(choice.name, dims, heads, grid=place, index=choice.index, **factory, **choice.options)
            self.branches.append(Branch(core, dims, sizes=sizes, **factory))
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, grid: Grid, residual: Tensor | None = None) -> Tensor:
        """`(B, H*W, C)`; the shape is kept. `residual`: the residual stream, for a mechanism that reads it."""
        count = len(self.branches)
        shares = unflatten(self.qkv(x), -1, (3, count, -1)).unbind(3)  # each (B, H*W, 3, C / count)
        reads = all(branch.core.reads_residual for branch in self.branches)  # type: ignore[union-attr]
        parts = (residual if residual is not None and reads else x).chunk(count, -1)
        outs = [branch(qkv, grid, part) for branch, qkv, part in zip(self.branches, shares, parts, strict=True)]
        return self.proj(outs[0] if count == 1 else torch.cat(outs, -1))


class CSwinBlock(PreNorm):
    """Pre-norm attention and MLP. As published, projections are the block's and a branch is one of `attns`."""

    gives_residual = True
    published = (
        Rename("qkv.", "attn.qkv."),
        Rename("proj.", "attn.proj."),
        Rename("attns.", "attn.branches."),
    )


class CSwinTransformer(PlainPyramid):
    """The host. The `reduction` of a stage is the width of its stripes, which are made for `img_size`."""

    reduces = True
    published = (
        Rename("stage1_conv_embed.0.", "stages.0.downsample.proj."),
        Rename("stage1_conv_embed.2.", "stages.0.downsample.norm."),
        *(Rename(f"merge{i}.conv.", f"stages.{i}.downsample.proj.") for i in range(1, 4)),
        *(Rename(f"merge{i}.norm.", f"stages.{i}.downsample.norm.") for i in range(1, 4)),
        *(Rename(f"stage{i + 1}.", f"stages.{i}.blocks.") for i in range(4)),
        Rename("head.", "head.fc."),
    )

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> ConvEmbed:
        """An overlapping convolution."""
        return ConvEmbed(in_dim, dim, 3, 2, 1, **factory) if i else ConvEmbed(in_dim, dim, 7, 4, 2, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention, in stripes where the cost is quadratic, and MLP."""
        entry, shared = mechanism(choice.name), {"grid": grid, **factory}
        attn: nn.Module
        if entry.kind == "core" and getattr(entry.factory, "projections", None) == "qkv":
            split = None if last or max(grid) <= size.reduction or not entry.quadratic else size.reduction
            attn = CrossShapedAttention(choice, size.dim, size.num_heads, split=split, **shared)
        else:  # with projections of its own, and so without LePE
            attn = make_layer(choice, size.dim, size.num_heads, **shared)
        mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio), **factory)
        return CSwinBlock(size.dim, attn, mlp, drop_path=drop_path, **factory)


def stages(width: int, depths: tuple[int, ...], widest: int = 7) -> tuple[StageSize, ...]:
    """The stages of a network whose first has `width` channels, and whose last two have stripes of width `widest`."""
    first, split = {64: 2, 96: 4}[width], (1, 2, widest, widest)
    return tuple(StageSize(width * 2**i, depths[i], first * 2**i, 4.0, split[i]) for i in range(4))


def _host(size: str, sizes: tuple[StageSize, ...], published: dict[str, Any], **cfg: Any) -> Host:
    cfg = {"first_conv": "stages.0.downsample.proj", "classifier": "head.fc", **cfg}
    return Host(f"cswin_{size}", CSwinTransformer, {"stages": sizes}, cfg, FOUR_MAPS, published)


# With softmax, as published: of averaged weights.
add_hosts(
    _host("tiny", stages(64, (1, 2, 21, 1)), figures(82.8, 22.32, 4.32, ema=True)),
    _host("small", stages(64, (2, 4, 32, 2)), figures(83.6, 34.64, 6.80, ema=True)),
    _host("base", stages(96, (2, 4, 32, 2)), figures(84.2, 77.38, 14.96, ema=True)),
    _host("base_384", stages(96, (2, 4, 32, 2), 12), figures(85.5, 77.38, 46.96, ema=True), input_size=(3, 384, 384)),
)
