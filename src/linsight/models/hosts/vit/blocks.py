"""The blocks of the ViT host, which timm's VisionTransformer builds for it."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from linsight.attention import Node, Rename, is_block
from linsight.errors import LinsightError, UnknownNameError
from linsight.ops import Layout, LayoutLike, as_layout

from ...parts.convs import CPE, BorderedPatches
from ...parts.siamese import Junction, Pair
from ...parts.stepsnet import Steps, block_widths, heads_of
from ...plan import Choice
from ...seams import NO_DROPPED_SCORES, make_layer, refuse_for_block, refuse_unbiased
from ...seams import make_block as whole_block

NORMS = ("pre", "siamese")
# What timm's model asks of its blocks unless told, by the names of its own arguments; and those of its blocks.
_USUAL = {
    name: found.default for name, found in inspect.signature(timm_vit.VisionTransformer.__init__).parameters.items()
}
_USUAL |= {"norm_layer": LayerNorm, "act_layer": nn.GELU, "cpe": False}
_OF_MODEL = {"proj_drop": "proj_drop_rate", "attn_drop": "attn_drop_rate", "drop_path": "drop_path_rate"}
# What the host needs, whatever timm's default: no layer is cut to one size, and timm asserts none that divide.
_ALWAYS = {"dynamic_img_size": True, "dynamic_img_pad": True}


def attention_layer(choice: Choice, grid: tuple[int, int]) -> type[nn.Module]:
    """A class for timm's `attn_layer=`, whose instances are linsight layers."""

    class Layer(nn.Module):
        def __new__(cls, dim: int, num_heads: int, **timm_args: Any) -> Any:
            if timm_args.get("qk_norm") or timm_args.get("scale_norm"):
                raise LinsightError(
                    "the ViT host has no norms inside attention: pass qk_norm=False, scale_attn_norm=False"
                )
            if timm_args.get("attn_drop"):
                raise LinsightError(f"attn_drop_rate={timm_args['attn_drop']}: {NO_DROPPED_SCORES}")
            shared = {key: timm_args[key] for key in ("qkv_bias", "proj_bias", "proj_drop", "device", "dtype")}
            return make_layer(choice, dim, num_heads, grid=grid, **shared)

    return Layer


class Block(timm_vit.Block, Node):
    """timm's pre-norm block around a linsight layer, behind a position encoding `cpe` where the host has one."""

    cpe: CPE | None
    drop_path1: nn.Module
    drop_path2: nn.Module
    ls1: nn.Module
    ls2: nn.Module
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    attn: nn.Module

    def forward(self, x: Tensor, layout: LayoutLike, keep: Tensor | None = None) -> Tensor:
        """`x` `(B, P + H*W, C)`, which lies as `layout` says."""
        layout = as_layout(layout)
        if self.cpe is not None:
            x = self.cpe(x, layout)
        x = self.add(x, dropped(self.drop_path1, self.ls1(self.attn(self.norm1(x), layout, keep=keep)), layout))
        return self.add(x, dropped(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), layout))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The sum of the residual stream and a branch."""
        return x + branch


def dropped(drop_path: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    """Stochastic depth: a branch is dropped for whole images, each of a packed batch by a draw of its own."""
    if not layout.is_packed or isinstance(drop_path, nn.Identity):
        return drop_path(x)
    drawn = drop_path(x.new_ones(len(layout.grids), 1, 1))
    return x * torch.cat([one.expand(grid.tokens, 1) for one, grid in zip(drawn, layout.grids, strict=True)])


class SiameseBlock(Block):
    """A block between two streams, which share one position encoding; `depth` is its place in the model."""

    # Published names say before or after the add; ours, which stream they norm.
    published = tuple(
        Rename(f"{name}_norm{i}.", ours.format(i))
        for i in (1, 2)
        for name, ours in (("post", "pair{}.norm_x."), ("pre", "pair{}.norm_y."), ("input", "norm{}."))
    )

    def __init__(self, dim: int, num_heads: int, *, depth: int, norm_layer: Any, **timm_args: Any) -> None:
        super().__init__(dim, num_heads, depth=depth, norm_layer=norm_layer, **timm_args)
        factory = {key: timm_args[key] for key in ("device", "dtype")}
        self.pair1 = Junction(norm_layer(dim, **factory), norm_layer(dim, **factory), depth)
        self.pair2 = Junction(norm_layer(dim, **factory), norm_layer(dim, **factory), depth)

    def forward(self, pair: Pair, layout: LayoutLike, keep: Tensor | None = None) -> Pair:  # type: ignore[override]
        """Streams `(B, P + H*W, C)`, which lie as `layout` says."""
        own = as_layout(layout)
        if self.cpe is not None:
            pair = Pair(self.cpe(pair.x, own), self.cpe(pair.y, own))
        pair = self.pair1(
            pair, lambda x: dropped(self.drop_path1, self.ls1(self.attn(self.norm1(x), own, keep=keep)), own)
        )
        return self.pair2(pair, lambda x: dropped(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), own))


def make_block(
    dim: int,
    num_heads: int,
    *,
    choices: list[Choice],
    grid: tuple[int, int],
    cpe: bool,
    norm: str,
    widths: Sequence[int] | None,
    depth: int = 0,
    **timm_args: Any,
) -> nn.Module:
    """For timm's `block_fn=`: the block at `depth`, of the width of its step, around the mechanism chosen for it."""
    choice = choices[depth]
    if norm not in NORMS:
        raise UnknownNameError("norm", norm, NORMS)
    if norm == "siamese" and is_block(choice.name):
        raise LinsightError(f"'{choice.name}' is a whole block, with a residual stream of its own: pass norm='pre'")
    if timm_args["attn_layer"] is not _USUAL["attn_layer"]:
        raise LinsightError("attn_layer=: the host makes its own layers, of the mechanism that attention= names")
    asked = {_OF_MODEL.get(key, key): value for key, value in timm_args.items() if key not in ("device", "dtype")}
    refuse_for_block(choice, {**asked, "cpe": cpe}, _USUAL)
    refuse_unbiased("/".join(dict.fromkeys(one.name for one in choices)), timm_args["qkv_bias"])
    if widths is not None:
        dim, num_heads = widths[depth], heads_of(widths[depth], dim, num_heads)
    shared = {key: timm_args[key] for key in ("mlp_ratio", "drop_path", "device", "dtype")}
    whole = whole_block(choice, dim, num_heads, grid=grid, **shared)
    if whole is not None:
        return whole
    kind = SiameseBlock if norm == "siamese" else Block
    block = kind(dim, num_heads, depth=depth, **{**timm_args, "attn_layer": attention_layer(choice, grid)})
    block.cpe = CPE(dim, device=timm_args["device"], dtype=timm_args["dtype"]) if cpe else None
    return block


def host_arguments(
    choices: list[Choice],
    grid: tuple[int, int],
    given: Mapping[str, Any],
    *,
    cpe: bool = False,
    norm: str = "pre",
    steps: Steps | None = None,
    border: int = 0,
) -> dict[str, Any]:
    """Arguments that make timm's VisionTransformer the host, beside those `given`; `grid` is that of its image size."""
    if 0 in grid:
        raise LinsightError(f"img_size gives a grid of {grid[0]}x{grid[1]} patches: a side is at least that of a patch")
    for name, value in _ALWAYS.items():
        if given.get(name, value) != value:
            raise LinsightError(f"{name}={given[name]}: this host takes images of any size, leave it out")
    if "block_fn" in given:
        raise LinsightError("block_fn=: the host makes its own blocks, of the mechanism that attention= names")
    widths = None if steps is None else block_widths(steps)
    embed = {}
    if border:
        if border < 0 or "embed_layer" in given:
            raise LinsightError(f"border={border}: give 0 or more, and no embed_layer= beside it")
        embed = {"embed_layer": functools.partial(BorderedPatches, border=border)}
        grid = grid[0] + 2 * border, grid[1] + 2 * border
    return {
        "block_fn": functools.partial(make_block, choices=choices, grid=grid, cpe=cpe, norm=norm, widths=widths),
        **embed,
        **_ALWAYS,
    }
