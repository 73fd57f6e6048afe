"""The Swin host: timm's SwinTransformer with any mechanism and any image size.

Liu et al., "Swin Transformer", ICCV 2021 (arXiv 2103.14030). A mechanism of quadratic cost has the host's
windows, shifted in every second block, with a relative position bias; the others see the whole grid, or
windows of their own (`attention_window=7`), shifted too but not masked, as published.

Any image size: images are padded at the right and bottom to whole patches, grids to whole windows, and what
pads a window is never seen by a token. (timm lets it be seen, so with softmax the two differ where a window
does not divide the grid.) The windows of a call are those that the model is built with; `set_input_size` scales
them with the grid, as timm does, or takes `window_size`, and resamples the bias (bicubic).

The published backbones for dense tasks differ: their windows keep their size and shift on any grid, and what pads
them is seen. `dense_windows` is that.

`steps=` widens a stage from step to step (StepsNet, arXiv 2511.14329, which published the budgets of its Swin but not
the widths: those of `steps_swin_*` are ours).

A traced, compiled or exported graph with windows is right at every size, also where a stage has a single window,
which is not shifted: the shift is computed from the size.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, to_2tuple
from timm.models import swin_transformer as timm_swin
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Block, Layer, Node, create_core, mechanism, recast
from linsight.errors import LinsightError
from linsight.ops import Grid, Partition, half_shift, unflatten, within

from ..parts.convs import WholePatches
from ..parts.images import CheckedImages, check_pool, check_pooled
from ..parts.stages import init_linear
from ..parts.stepsnet import Steps, block_widths, narrow, opened, widened
from ..parts.windows import WindowAttention
from ..plan import Choice, named, plan
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host, figures
from ..seams import asked_no_weight_decay, in_place_of, make_layer, refuse_unbiased
from ..steps import StreamPlan
from ..timm.steps import swin_plan

Window = int | tuple[int, int] | None


class SwinBlock(Node):
    """Pre-norm attention, on the whole grid or in windows, and MLP. Made of a block of timm, whose parts go on."""

    def __init__(
        self,
        theirs: timm_swin.SwinTransformerBlock,
        attn: Layer,
        window: tuple[int, int] | None,
        shift: tuple[int, int],
        *,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = theirs.norm1, attn, theirs.drop_path1
        self.norm2, self.mlp, self.drop_path2 = theirs.norm2, theirs.mlp, theirs.drop_path2
        self.window, self.shift, self.dense = window, shift, dense
        self.input_resolution = theirs.input_resolution

    def set_size(self, grid: tuple[int, int], window: tuple[int, int], shifted: bool) -> None:
        """Move tables to another grid or, where the host's windows are used, to another window."""
        self.input_resolution = grid
        if isinstance(self.attn, WindowAttention):
            self.window = window if self.dense else within(window, grid)
            self.attn.set_window(self.window)
            half = (window[0] // 2, window[1] // 2) if self.dense else half_shift(self.window, grid)
            self.shift = half if shifted else (0, 0)
        else:
            self.attn.set_grid(grid if self.window is None else within(self.window, grid))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        x = self.add(x, self.drop_path1(self._mix(self.norm1(x), grid)))
        return self.add(x, self.drop_path2(self.mlp(self.norm2(x))))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """The sum of the residual stream and a branch."""
        return x + branch

    def _mix(self, x: Tensor, grid: Grid) -> Tensor:
        if self.window is None:
            return self.attn(x, grid)
        window = self.window if isinstance(self.attn, WindowAttention) else within(self.window, grid[:2])
        windows = Partition(grid, window, self.shift, always=self.dense)
        arguments = {"keep": None if self.dense else windows.keep(x)}
        if isinstance(self.attn, WindowAttention):  # a mechanism without scores has no use for what is added to them
            arguments["score_bias"] = windows.apart(x)
        return windows.join(self.attn(windows.cut(x), windows.inner, **arguments))


class Merging(timm_swin.PatchMerging):
    """timm's patch merging, its sizes written as ceilings: to reason about remainders of remainders takes minutes."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C)` -> `(B, ceil(H / 2), ceil(W / 2), C')`."""
        high, wide = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * wide - x.shape[2], 0, 2 * high - x.shape[1]))
        x = unflatten(unflatten(x, 2, (wide, 2)), 1, (high, 2))  # (B, h, dy, w, dx, C)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinStage(timm_swin.SwinTransformerStage):
    """timm's stage around blocks that work on tokens and their grid, each on its first `widths[i]` channels."""

    widths: list[int]
    width: int  # of the maps

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, H, W, C)` in and out."""
        x = self.downsample(x)
        grid = Grid(x.shape[1], x.shape[2])
        whole = x.flatten(1, 2)
        x, known = opened(whole, self.widths, self.width), [*self.widths[:1], *self.widths]
        for block, last, width in zip(self.blocks, known, self.widths, strict=False):
            x = widened(x, whole, width, last)
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return unflatten(widened(x, whole, self.width, self.widths[-1]), 1, (grid.height, grid.width))

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """As timm's: `feat_size` is the grid before the stage merges patches."""
        if always_partition:
            raise LinsightError("a grid of one window is not shifted here: pass always_partition=False")
        grid = feat_size
        if not isinstance(self.downsample, nn.Identity):
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        self.input_resolution, self.output_resolution = feat_size, grid
        for i, block in enumerate(self.blocks):
            if isinstance(block, SwinBlock):
                block.set_size(grid, to_2tuple(window_size), i % 2 == 1)
            else:
                block.set_grid(grid)


class SwinTransformer(CheckedImages, timm_swin.SwinTransformer):
    """timm's class, all its arguments, and

    attention: a mechanism, one a stage, or the first k blocks of a stage (see `plan`).
    attention_options: keyword arguments of that mechanism.
    window_size: timm's, the windows of mechanisms of quadratic cost.
    attention_window: a window for mechanisms of linear cost; None: the whole grid.
    dense_windows: the host's windows as in the published backbones for dense tasks: they keep their size and shift
        on any grid, and what pads the grid to whole windows is seen, by softmax.
    steps: in place of `depths`, those of each stage, as `(width, number of blocks)`, the last of the whole width; a
        head is as wide in all of them. Shifts go on alternating from step to step.
    """

    patch_embed: Any

    def __init__(
        self,
        *timm_args: Any,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        attention_window: Window = None,
        dense_windows: bool = False,
        depths: Sequence[int] = (2, 2, 6, 2),
        steps: Sequence[Steps] | None = None,
        **timm_kwargs: Any,
    ) -> None:
        self.check(attention, timm_kwargs)
        if steps is not None:
            depths = [len(block_widths(row)) for row in steps]
        choices = plan(attention, depths, attention_options)
        if dense_windows:
            timm_kwargs["always_partition"] = True
        super().__init__(*timm_args, depths=tuple(depths), **timm_kwargs)
        for stage, row in zip(self.layers, steps or (), strict=steps is not None):
            narrow(stage.blocks, row, timm_kwargs.get("norm_layer", nn.LayerNorm))
        self.put(choices, attention_window, dense_windows)

    @staticmethod
    def check(attention: str, given: Mapping[str, Any]) -> None:
        """Raise for arguments that could not be honoured."""
        refuse_unbiased(attention, given.get("qkv_bias", True))
        check_pool(given.get("global_pool", "avg"))
        size, patch = (to_2tuple(given.get(key) or side) for key, side in (("img_size", 224), ("patch_size", 4)))
        if size[0] < patch[0] or size[1] < patch[1]:
            raise LinsightError(f"img_size={size}: a side is at least that of a patch")
        if given.get("strict_img_size") or given.get("dynamic_img_size") is False:
            raise LinsightError("this host takes images of any size: leave strict_img_size and dynamic_img_size out")
        if given.get("embed_layer", PatchEmbed) is not PatchEmbed:
            raise LinsightError("embed_layer=: the host pads images to whole patches by its own, leave it out")

    @staticmethod
    def idle(attention: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Arguments that have no effect with these mechanisms, and why: for `create_model` to refuse."""
        found: dict[str, str] = {}
        kinds = named(attention)
        if arguments.get("attention_window") is None and not any(kind.quadratic for kind in kinds):
            found["dense_windows"] = f"'{attention}' sees the whole grid"
        if all(kind.quadratic or kind.kind == "block" for kind in kinds):
            found["attention_window"] = f"'{attention}' has no window beside those of window_size="
        return found

    @classmethod
    def adopt(
        cls,
        model: timm_swin.SwinTransformer,
        choices: Sequence[Sequence[Choice]],
        img_size: tuple[int, int],
        attention_window: Window = None,
    ) -> "SwinTransformer":
        """A model of timm, with its weights, as one of ours: this class adds methods and no state."""
        ours = recast(model, cls)
        ours.put(choices, attention_window)
        return ours

    def put(self, choices: Sequence[Sequence[Choice]], attention_window: Window, dense_windows: bool = False) -> None:
        """The chosen mechanisms in the place of timm's attention, whose weights go on where they fit."""
        self.patch_embed = recast(self.patch_embed, WholePatches)
        self.patch_embed.strict_img_size, self.dynamic_img_size = False, True
        for n, (theirs, row) in enumerate(zip(self.layers, choices, strict=True)):
            self.layers[n] = stage = recast(theirs, SwinStage)
            stage.widths, stage.width = [block.dim for block in stage.blocks], stage.dim
            if isinstance(stage.downsample, timm_swin.PatchMerging):
                stage.width = stage.downsample.reduction.out_features
                stage.downsample = recast(stage.downsample, Merging)
            for i, choice in enumerate(row):
                stage.blocks[i] = _replacement(
                    stage.blocks[i], choice, attention_window, shifted=i % 2 == 1, dense=dense_windows
                )

    @property
    def maps(self) -> int:
        """A map of each stage."""
        return len(self.layers)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, for `num_classes` classes, or none (0), on the last map pooled in another way."""
        if global_pool is not None:
            check_pool(global_pool)
        check_pooled(self.head.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's names, and what the mechanisms ask for."""
        return super().no_weight_decay() | asked_no_weight_decay(self)

    def stream_plan(self) -> StreamPlan:
        """The steps that an image goes through in tiles."""
        return swin_plan(self)


def _replacement(
    theirs: timm_swin.SwinTransformerBlock,
    choice: Choice,
    attention_window: Window,
    *,
    shifted: bool,
    dense: bool,
) -> nn.Module:
    if theirs.always_partition and not dense:
        raise LinsightError(
            "a grid of one window is not shifted here: pass always_partition=False, or dense_windows=True"
        )
    if attention_window is not None and min(to_2tuple(attention_window)) < 1:
        raise LinsightError(
            f"attention_window={attention_window}: give its side, 1 or more, or None for the whole grid"
        )
    entry, grid = mechanism(choice.name), theirs.input_resolution
    window: Any = theirs.window_size if entry.quadratic else attention_window and to_2tuple(attention_window)
    own_layer = getattr(entry.factory, "layer", None)  # whose projections windows with a bias would not have
    biased = entry.kind == "core" and entry.quadratic and entry.capabilities.score_bias and own_layer is None
    make = partial(make_layer, grid=within(window, grid) if window else grid)
    new = in_place_of(theirs, choice, grid, partial(_in_window, window=window) if biased else make, init_linear)
    if isinstance(new, Block):
        return new
    shift = (window[0] // 2, window[1] // 2) if window and shifted else (0, 0)
    return SwinBlock(theirs, new, window, theirs.shift_size if biased else shift, dense=dense)


def _in_window(choice: Choice, dim: int, num_heads: int, *, window: tuple[int, int], **shared: Any) -> WindowAttention:
    factory = {key: shared[key] for key in ("device", "dtype")}
    core = create_core(choice.name, dim, num_heads, index=choice.index, **factory, **choice.options)
    return WindowAttention(core, dim, window=window, **shared)


_CFG = {"first_conv": "patch_embed.proj", "classifier": "head.fc"}
_CFG_384 = {**_CFG, "input_size": (3, 384, 384), "crop_pct": 1.0}  # evaluated without a crop
_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}

# With softmax, as published; with window 12 at 384.
add_hosts(
    Host("swin_tiny", SwinTransformer, _TINY, _CFG, FOUR_MAPS, figures(81.3, 28.29, 4.49)),
    Host(
        "swin_small", SwinTransformer, {**_TINY, "depths": (2, 2, 18, 2)}, _CFG, FOUR_MAPS, figures(83.0, 49.61, 8.74)
    ),
    Host("swin_base", SwinTransformer, _BASE, _CFG, FOUR_MAPS, figures(83.5, 87.77, 15.43)),
    Host(
        "swin_base_384", SwinTransformer, {**_BASE, "window_size": 12}, _CFG_384, FOUR_MAPS, figures(84.5, 87.90, 47.08)
    ),
)
