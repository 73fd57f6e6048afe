"""Narrow blocks in a stage of Swin."""

from collections.abc import Callable
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from ._stages import init_linear
from ._steps import Steps, block_widths, check_last, heads_of


def narrow(blocks: nn.Sequential, steps: Steps, norm_layer: Callable[..., nn.Module]) -> None:
    """Give each of timm's `blocks`, in place, the width of its step; in all else it is as it was."""
    for i, width in enumerate(block_widths(steps)):
        old: Any = blocks[i]
        if i == 0:
            check_last(steps, old.dim)
        if width == old.dim:
            continue
        weight = old.attn.proj.weight
        blocks[i] = SwinTransformerBlock(
            width,
            old.input_resolution,
            heads_of(width, old.dim, old.attn.num_heads),
            window_size=old.window_size,
            shift_size=old.target_shift_size,
            always_partition=old.always_partition,
            dynamic_mask=old.dynamic_mask,
            mlp_ratio=old.mlp_ratio,
            qkv_bias=old.attn.qkv.bias is not None,
            proj_drop=old.attn.proj_drop.p,
            attn_drop=old.attn.attn_drop.p,
            drop_path=getattr(old.drop_path1, "drop_prob", 0.0),
            norm_layer=norm_layer,
            device=weight.device,
            dtype=weight.dtype,
        ).apply(init_linear)
