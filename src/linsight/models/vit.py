"""The ViT and DeiT host: timm's VisionTransformer with any mechanism and any image size.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929); Touvron et al.,
"Training data-efficient image transformers", ICML 2021 (arXiv 2012.12877). Every mechanism, of quadratic
cost or linear, sees the whole grid and the class token.

Any image size: what differs from timm's class is that blocks are given the grid of their tokens with the
call (so checkpointing and compilation see it), that images are padded at the right and bottom to whole
patches, and that the position table is resampled (bicubic) to their grid.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import vision_transformer as timm_vit
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from linsight.attention import Rename
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid

from ._convs import CPE
from ._plan import Choice, plan
from ._seams import asked_no_weight_decay, make_layer, refuse_prefix, set_grid
from ._seams import make_block as whole_block


def attention_layer(choice: Choice, grid: tuple[int, int]) -> type[nn.Module]:
    """A class for timm's `attn_layer=`, whose instances are linsight layers."""

    class Layer(nn.Module):
        def __new__(cls, dim: int, num_heads: int, **timm_args: Any) -> Any:
            if timm_args.get("qk_norm") or timm_args.get("scale_norm"):
                raise LinsightError("the ViT host has no query/key normalisation: pass qk_norm=False")
            if timm_args.get("attn_drop"):
                raise LinsightError("linear attention has no score matrix to drop from: pass attn_drop_rate=0")
            shared = {key: timm_args[key] for key in ("qkv_bias", "proj_bias", "proj_drop", "device", "dtype")}
            return make_layer(choice, dim, num_heads, grid=grid, **shared)

    return Layer


class Block(timm_vit.Block):
    """timm's pre-norm block around a linsight layer, behind a position encoding `cpe` where the host has one."""

    cpe: CPE | None

    def forward(self, x: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """`x` `(B, P + H*W, C)`, on `grid`."""
        if self.cpe is not None:
            x = self.cpe(x, grid)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid, keep=keep)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def make_block(
    dim: int,
    num_heads: int,
    *,
    choices: list[Choice],
    grid: tuple[int, int],
    cpe: bool,
    depth: int = 0,
    **timm_args: Any,
) -> nn.Module:
    """For timm's `block_fn=`: the block at `depth`, around the mechanism chosen for it."""
    choice = choices[depth]
    shared = {key: timm_args[key] for key in ("mlp_ratio", "drop_path", "device", "dtype")}
    whole = whole_block(choice, dim, num_heads, grid=grid, **shared)
    if whole is not None:
        return whole
    block = Block(dim, num_heads, depth=depth, **{**timm_args, "attn_layer": attention_layer(choice, grid)})
    block.cpe = CPE(dim, device=timm_args["device"], dtype=timm_args["dtype"]) if cpe else None
    return block


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's VisionTransformer, all its arguments, and

    attention: a mechanism, or `"inline:4/softmax"` for the first 4 blocks and the rest.
    attention_options: keyword arguments of that mechanism.
    cpe: a depthwise convolution in front of each block, beside `pos_embed` or in its place ("none").
    """

    published = (Rename("init_norm.", "patch_embed.norm."),)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *timm_args: Any,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        cpe: bool = False,
        depth: int = 12,
        **timm_kwargs: Any,
    ) -> None:
        (choices,) = plan(attention, [depth], attention_options)
        (height, width), (down, right) = to_2tuple(img_size), to_2tuple(patch_size)
        ours = host_arguments(choices, (height // down, width // right), cpe)
        super().__init__(img_size, patch_size, *timm_args, depth=depth, **ours, **timm_kwargs)
        if self.num_prefix_tokens:
            refuse_prefix(choices, "pass class_token=False, global_pool='avg'")
        if not isinstance(self.patch_drop, nn.Identity):
            raise LinsightError("dropped patches leave no grid: pass patch_drop_rate=0")

    @classmethod
    def adopt(cls, model: timm_vit.VisionTransformer) -> "VisionTransformer":
        """A VisionTransformer that timm built with `host_arguments`, as one of ours.

        This class adds methods to timm's and no state, so the object itself changes class.
        """
        if type(model) is not timm_vit.VisionTransformer:
            raise LinsightError(f"the ViT host cannot take over a {type(model).__name__}")
        model.__class__ = cls
        assert isinstance(model, cls)
        return model

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, with the class token at the published standard deviation of 0.02."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """timm's; the tables of mechanisms are resampled too."""
        super().set_input_size(*args, **kwargs)
        set_grid(self.blocks, self.patch_embed.grid_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's names, and what the mechanisms ask for."""
        return super().no_weight_decay() | asked_no_weight_decay(self)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images `(B, 3, H, W)` of any size -> normed tokens `(B, P + h*w, C)`."""
        x, grid = self._embed(x, attn_mask, is_causal)
        for block in self.blocks:
            x = self._run(block, x, grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's: the tokens after the blocks `indices`, as maps or sequences, and the final ones."""
        if output_fmt not in ("NCHW", "NLC"):
            raise LinsightError(f"output_fmt='{output_fmt}' is not one of NCHW, NLC")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x, attn_mask, is_causal)
        prefixes, maps = [], []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run(block, x, grid)
            if i in take:
                tokens = self.norm(x) if norm else x
                prefix, spatial = tokens[:, : grid.prefix], tokens[:, grid.prefix :]
                if output_fmt == "NCHW":
                    spatial = spatial.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2).contiguous()
                prefixes.append(prefix)
                maps.append(spatial)
        with_prefix = return_prefix_tokens and grid.prefix > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        found: list[Any] = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
        return found if intermediates_only else (self.norm(x), found)

    def _embed(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Grid]:
        if attn_mask is not None or is_causal:
            raise CapabilityError("this host takes no attn_mask or is_causal: its layers take keep= and score_bias=")
        x = self.patch_embed(x)  # (B, h, w, C)
        grid = Grid(x.shape[1], x.shape[2], self.num_prefix_tokens)
        return self.norm_pre(self._pos_embed(x)), grid

    def _run(self, block: nn.Module, x: Tensor, grid: Grid) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint(block, x, grid)
        return block(x, grid)


def host_arguments(choices: list[Choice], grid: tuple[int, int], cpe: bool = False) -> dict[str, Any]:
    """What timm's VisionTransformer is built with to become the host; `grid` is that of its image size."""
    return {
        "block_fn": functools.partial(make_block, choices=choices, grid=grid, cpe=cpe),
        "dynamic_img_size": True,
        # without it, timm asserts divisible sizes, which makes a compiled graph for each
        "dynamic_img_pad": True,
    }
