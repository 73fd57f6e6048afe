"""The Swin host: timm's SwinTransformer with any mechanism and any image size.

Liu et al., "Swin Transformer", ICCV 2021 (arXiv 2103.14030). A mechanism of quadratic cost has the host's
windows, shifted in every second block, with a relative position bias; the others see the whole grid, or
windows of their own (`attention_window=7`), shifted too but not masked, as published.

Any image size: images are padded at the right and bottom to whole patches, grids to whole windows, and what
pads a window is never seen by a token. (timm lets it be seen, so with softmax the two differ where a window
does not divide the grid.) The windows of a call are those that the model is built with; `set_input_size` scales
them with the grid, as timm does, or takes `window_size`, and resamples the bias (bicubic).

A compiled or exported graph with windows serves all sizes that leave several in each stage: whether there is
one or more is what torch asks of a batch of them, so a stage of a single window is a graph of its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, resize_rel_pos_bias_table_simple, to_2tuple, trunc_normal_
from timm.models import swin_transformer as timm_swin
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.attention import Attention, Layer, create_core, mechanism
from linsight.ops import FittedTable, Grid, LayoutLike

from ._plan import Choice, plan
from ._pyramid import init_linear
from ._seams import asked_no_weight_decay, inherit, make_block, make_layer


class WindowAttention(Attention):
    """Attention in a window, with Swin's relative position bias: a table `((2h-1) * (2w-1), heads)` for the scores."""

    relative_position_index: Tensor

    def __init__(self, *args: Any, window: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = window
        table = self.proj.weight.new_zeros(_places(window), self.num_heads)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Which row of the table each pair of tokens reads; for timm to call after `to_empty`, too."""
        index = timm_swin.get_relative_position_index(*self.window, device=self.relative_position_bias_table.device)
        self.register_buffer("relative_position_index", index.flatten(), persistent=False)

    def forward(self, x: Tensor, layout: LayoutLike, *, score_bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """See `Attention.forward`; `x` are the tokens of one window."""
        area = self.window[0] * self.window[1]
        bias: Tensor = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.unflatten(0, (area, area)).permute(2, 0, 1)[None]  # (1, heads, area, area)
        return super().forward(x, layout, score_bias=bias if score_bias is None else bias + score_bias, **kwargs)

    def fit_table(self, name: str, table: Tensor) -> FittedTable | None:
        """A published table of another window, resampled to ours."""
        return fit_bias_table(table, self.window) if name == "relative_position_bias_table" else None

    def set_window(self, window: tuple[int, int]) -> None:
        """Resample the table to another window, for good."""
        if window != self.window:
            old = self.relative_position_bias_table
            rows = old.detach().T.unflatten(1, tuple(2 * side - 1 for side in self.window))[None]
            new = F.interpolate(rows, tuple(2 * side - 1 for side in window), mode="bicubic")[0].flatten(1).T
            self.relative_position_bias_table = nn.Parameter(new.contiguous(), old.requires_grad)
            self.window = window
            self.init_non_persistent_buffers()


def fit_bias_table(table: Tensor, window: tuple[int, int]) -> FittedTable | None:
    """A bias table `(places, heads)` of a square window, for another window; bicubic, as published."""
    side = math.isqrt(len(table))
    if table.ndim != 2 or side * side != len(table) or side % 2 == 0:
        return None
    resized = resize_rel_pos_bias_table_simple(table, window, (_places(window), table.shape[1]))
    return FittedTable(resized, ((side + 1) // 2, (side + 1) // 2), window)


def _places(window: tuple[int, int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _ceil(side: int, size: int) -> int:
    """The least multiple of `size` that is not below `side`; in a form that stays short in a graph."""
    return (side + size - 1) // size * size


class Windows:
    """How the tokens of a grid are cut into windows, shifted cyclically.

    The grid is padded at the bottom and right to whole windows, then rolled by the shift, so the last
    windows hold tokens from opposite rims: up to three regions a side, which do not see each other.
    """

    def __init__(self, grid: Grid, window: tuple[int, int], shift: tuple[int, int]) -> None:
        self.grid, self.window = grid, window
        self.padded = tuple(_ceil(side, size) for side, size in zip(grid[:2], window, strict=True))
        # A side of one window is not shifted.
        self.shift = tuple(
            step if step and side > size else 0 for step, side, size in zip(shift, self.padded, window, strict=True)
        )

    @property
    def inner(self) -> Grid:
        """The grid of one window."""
        return Grid(*self.window)

    def cut(self, x: Tensor) -> Tensor:
        """`(B, H*W, C)` -> `(B * windows, h*w, C)`, those of an image together."""
        grid, (height, width) = self.grid, self.padded
        x = F.pad(x.unflatten(1, grid[:2]), (0, 0, 0, width - grid.width, 0, height - grid.height))
        return self._cut(self._roll(x, -1))

    def join(self, x: Tensor) -> Tensor:
        """The other way."""
        (h, w), (height, width) = self.window, self.padded
        x = x.unflatten(0, (-1, height // h, width // w)).unflatten(3, (h, w))
        x = self._roll(x.transpose(2, 3).flatten(3, 4).flatten(1, 2), 1)
        if torch.compiler.is_compiling():  # not by slices: a graph would ask whether they are all there is
            for axis, side in ((1, self.grid.height), (2, self.grid.width)):
                x = x.index_select(axis, torch.arange(side, device=x.device))
        else:
            x = x[:, : self.grid.height, : self.grid.width]
        return x.flatten(1, 2)

    def keep(self, like: Tensor) -> Tensor | None:
        """`(windows, h*w)` bool, False for padding; None where there is none."""
        # In a graph, whether there is padding must not be asked: each answer would be a graph of its own.
        if not torch.compiler.is_compiling() and self.padded == tuple(self.grid[:2]):
            return None
        rows, columns = (
            torch.arange(padded, device=like.device) < side
            for padded, side in zip(self.padded, self.grid[:2], strict=True)
        )
        inside = (rows[:, None] & columns)[None, ..., None]
        return self._cut(self._roll(inside, -1))[..., 0]

    def apart(self, like: Tensor) -> Tensor | None:
        """`(windows, 1, h*w, h*w)`, -100 between tokens of different regions; None without a shift."""
        if not any(self.shift):
            return None
        regions = []
        for padded, size, shift in zip(self.padded, self.window, self.shift, strict=True):
            place = torch.arange(padded, device=like.device)
            regions.append((place >= padded - size).long() + (place >= padded - shift))
        region = self._cut((3 * regions[0][:, None] + regions[1])[None, ..., None])[..., 0]
        return -100.0 * (region[:, None, :, None] != region[:, None, None, :]).to(like.dtype)

    def _roll(self, x: Tensor, sign: int) -> Tensor:
        return x.roll([sign * step for step in self.shift], (1, 2)) if any(self.shift) else x

    def _cut(self, x: Tensor) -> Tensor:
        (h, w), (height, width) = self.window, self.padded
        x = x.unflatten(2, (width // w, w)).unflatten(1, (height // h, h))  # (B, rows, h, columns, w, C)
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


class SwinBlock(nn.Module):
    """Pre-norm attention, on the whole grid or in windows, and MLP. Made of a block of timm, whose parts go on."""

    def __init__(
        self,
        theirs: timm_swin.SwinTransformerBlock,
        attn: Layer,
        window: tuple[int, int] | None,
        shift: tuple[int, int],
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = theirs.norm1, attn, theirs.drop_path1
        self.norm2, self.mlp, self.drop_path2 = theirs.norm2, theirs.mlp, theirs.drop_path2
        self.window, self.shift = window, shift

    def set_size(self, grid: tuple[int, int], window: tuple[int, int], shifted: bool) -> None:
        """Move tables to another grid or, where the host's windows are used, to another window."""
        if isinstance(self.attn, WindowAttention):
            self.window = _within(window, grid)
            self.attn.set_window(self.window)
            self.shift = _shift(self.window, grid) if shifted else (0, 0)
        else:
            self.attn.set_grid(grid if self.window is None else _within(self.window, grid))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H*W, C)`; the shape is kept."""
        x = x + self.drop_path1(self._mix(self.norm1(x), grid))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _mix(self, x: Tensor, grid: Grid) -> Tensor:
        if self.window is None:
            return self.attn(x, grid)
        window = self.window if isinstance(self.attn, WindowAttention) else _within(self.window, grid[:2])
        windows = Windows(grid, window, self.shift)
        inside = windows.cut(x)
        arguments = {"keep": windows.keep(x)}
        if isinstance(self.attn, WindowAttention):  # a mechanism without scores has no use for what is added to them
            arguments["score_bias"] = windows.apart(x)
        batch = x.shape[0]
        for name, value in arguments.items():
            if value is not None:
                arguments[name] = value.expand(batch, *value.shape).flatten(0, 1)
        return windows.join(self.attn(inside, windows.inner, **arguments))


def _within(window: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    return min(window[0], grid[0]), min(window[1], grid[1])


def _shift(window: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Half a window, along a side that has more than one."""
    rows, columns = (size // 2 if side > size else 0 for size, side in zip(window, grid, strict=True))
    return rows, columns


class WholePatches(PatchEmbed):
    """timm's patch embedding of any size, padded to whole patches, without its checks, which make a graph for each."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, ceil(H / p), ceil(W / p), C)`."""
        high, wide = (_ceil(side, size) for side, size in zip(x.shape[2:], self.patch_size, strict=True))
        x = self.proj(F.pad(x, (0, wide - x.shape[3], 0, high - x.shape[2])))
        return self.norm(x.permute(0, 2, 3, 1))


class Merging(timm_swin.PatchMerging):
    """timm's patch merging, its sizes written as ceilings: to reason about remainders of remainders takes minutes."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C)` -> `(B, ceil(H / 2), ceil(W / 2), C')`."""
        high, wide = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * wide - x.shape[2], 0, 2 * high - x.shape[1]))
        x = x.unflatten(2, (wide, 2)).unflatten(1, (high, 2))  # (B, h, dy, w, dx, C)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinStage(timm_swin.SwinTransformerStage):
    """timm's stage around blocks that work on tokens and their grid."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, H, W, C)` in and out."""
        x = self.downsample(x)
        grid = Grid(x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x.unflatten(1, (grid.height, grid.width))

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """As timm's: `feat_size` is the grid before the stage merges patches."""
        grid = feat_size
        if not isinstance(self.downsample, nn.Identity):
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        self.input_resolution, self.output_resolution = feat_size, grid
        for i, block in enumerate(self.blocks):
            if isinstance(block, SwinBlock):
                block.set_size(grid, to_2tuple(window_size), i % 2 == 1)
            else:
                block.set_grid(grid)


class SwinTransformer(timm_swin.SwinTransformer):
    """timm's class, all its arguments, and

    attention: a mechanism, one a stage, or the first k blocks of a stage (see `plan`).
    attention_options: keyword arguments of that mechanism.
    attention_window: a window for mechanisms of linear cost; None: the whole grid.
    """

    def __init__(
        self,
        *timm_args: Any,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        attention_window: int | None = None,
        depths: Sequence[int] = (2, 2, 6, 2),
        **timm_kwargs: Any,
    ) -> None:
        choices = plan(attention, depths, attention_options)
        super().__init__(*timm_args, depths=tuple(depths), **timm_kwargs)
        self.put(choices, attention_window)

    @classmethod
    def adopt(
        cls,
        model: timm_swin.SwinTransformer,
        choices: Sequence[Sequence[Choice]],
        img_size: tuple[int, int],
        attention_window: int | None = None,
    ) -> None:
        """Make a model of timm, its weights too, one of ours: this class adds methods and no state."""
        model.__class__ = cls
        model.put(choices, attention_window)

    def put(self, choices: Sequence[Sequence[Choice]], attention_window: int | None) -> None:
        """The chosen mechanisms in the place of timm's attention, whose weights go on where they fit."""
        self.patch_embed.__class__ = WholePatches
        self.patch_embed.strict_img_size, self.dynamic_img_size = False, True
        for stage, row in zip(self.layers, choices, strict=True):
            stage.__class__ = SwinStage
            if isinstance(stage.downsample, timm_swin.PatchMerging):
                stage.downsample.__class__ = Merging
            for i, choice in enumerate(row):
                stage.blocks[i] = _replacement(stage.blocks[i], choice, attention_window, i % 2 == 1)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's names, and what the mechanisms ask for."""
        return super().no_weight_decay() | asked_no_weight_decay(self)


def _replacement(
    theirs: timm_swin.SwinTransformerBlock, choice: Choice, attention_window: int | None, shifted: bool
) -> nn.Module:
    old, grid = theirs.attn, theirs.input_resolution
    factory = {"device": old.proj.weight.device, "dtype": old.proj.weight.dtype}
    whole = make_block(
        choice,
        theirs.dim,
        old.num_heads,
        mlp_ratio=theirs.mlp_ratio,
        drop_path=getattr(theirs.drop_path1, "drop_prob", 0.0),
        grid=grid,
        **factory,
    )
    if whole is not None:
        return whole.apply(init_linear)
    shared = {"qkv_bias": old.qkv.bias is not None, "proj_drop": old.proj_drop.p, **factory}
    entry = mechanism(choice.name)
    if entry.kind == "core" and entry.capabilities.score_bias:
        core = create_core(choice.name, theirs.dim, old.num_heads, **factory, **choice.options)
        attn: Layer = WindowAttention(core, theirs.dim, window=theirs.window_size, **shared)
        inherit(attn, old.state_dict())
        return SwinBlock(theirs, attn, theirs.window_size, theirs.shift_size)
    window = (attention_window,) * 2 if attention_window else None
    if entry.quadratic:
        window = theirs.window_size
    place = grid if window is None else _within(window, grid)
    attn = make_layer(choice, theirs.dim, old.num_heads, grid=place, **shared).apply(init_linear)
    shift = (window[0] // 2, window[1] // 2) if window is not None and shifted else (0, 0)
    return SwinBlock(theirs, attn, window, shift)
