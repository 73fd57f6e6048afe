"""StepsNet: residual sub-networks of growing width, each given the output of the last and a fresh slice of channels.

"Step by Step Network", arXiv 2511.14329:

    y_1 = F_1(x_1);  y_i = F_i([y_(i-1), x_i]);  x = [x_1, ..., x_n], slices of the channels

F_i is a stack of a host's ordinary blocks of the width of all slices so far. What is processed goes first and the
new slice last, as in this formula; no code is published that would settle it.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from linsight.errors import LinsightError

from .stages import init_linear

Steps = Sequence[tuple[int, int]]  # (width, number of blocks) of each step; 0 blocks: its slice passes by


def block_widths(steps: Steps) -> list[int]:
    """The width of each block.

    Raises:
        LinsightError: these are not pairs, or the widths do not grow.
    """
    listed = steps if isinstance(steps, list | tuple) else ()
    pairs = [tuple(step) if isinstance(step, list | tuple) else () for step in listed]
    if not pairs or not all(len(pair) == 2 and isinstance(pair[0], int) and pair[1] >= 0 for pair in pairs):
        raise LinsightError(f"steps={steps}: give pairs of a width and a number of blocks, as [(96, 4), (192, 8)]")
    widths = [width for width, _ in pairs]
    if widths[0] < 1 or any(wide <= narrow for narrow, wide in pairwise(widths)):
        raise LinsightError(f"steps={steps}: each step adds channels, so widths must grow")
    return [width for width, depth in pairs for _ in range(depth)]


def check_last(steps: Steps, width: int) -> None:
    """Raise unless the last step has the whole `width`."""
    if steps[-1][0] != width:
        raise LinsightError(f"steps={steps}: the last step takes all {width} channels, not {steps[-1][0]}")


def heads_of(width: int, dim: int, num_heads: int) -> int:
    """The heads of a step, of the width that `num_heads` have in `dim`; raises where that does not divide `width`."""
    if dim % num_heads or width % (dim // num_heads):
        raise LinsightError(
            f"a step of {width} channels does not divide into the heads of {num_heads} in {dim}: "
            f"choose a multiple of {dim / num_heads:g}"
        )
    return width * num_heads // dim


def opened(whole: Tensor, widths: Sequence[int], full: int) -> Tensor:
    """The channels of `whole`, of `full` in all, that the first of blocks of these `widths` takes; channels last."""
    width = widths[0] if widths else full
    return whole if width == full else whole[..., :width]


def widened(part: Tensor, whole: Tensor, width: int, known: int) -> Tensor:
    """`part`, the `known` processed channels of `whole`, followed by the fresh ones up to `width`; channels last."""
    return part if known == width else torch.cat([part, whole[..., known:width]], dim=-1)


def narrow(blocks: nn.Sequential, steps: Steps, norm_layer: Callable[..., nn.Module]) -> None:
    """Give each block of a stage of timm's Swin, in place, the width of its step; in all else it is as it was."""
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
