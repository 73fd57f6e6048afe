"""VideoMamba: all tokens of all frames in one sequence behind a class token, and blocks without an MLP.

Li et al., "VideoMamba: State Space Model for Efficient Video Understanding", ECCV 2024 (arXiv 2403.06977), by its
published code. Clips are cut into patches of `tubelet` frames; a table of places in the frame is added to each frame,
and one of places in time to all tokens of a frame; the class token has a place of its own. A block is
x + mixer(RMSNorm(x)), and the head reads the class token. Frames stand in the order of time, each row by row: a
mechanism sees them as the grid of one tall image, where frames lie below each other. `bimamba` is the published one.

Clips are filled up to whole patches with zeros at their ends, the tables are resampled to any size and length.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linsight.attention.parts.wide import WideRMSNorm
from linsight.errors import LinsightError
from linsight.ops import FittedTable, Grid, Tile

from ..doors import check_whole, whole_size
from ..parts.mixer import Mixer, mixers
from ..parts.positions import with_positions
from ..parts.stages import init_linear
from ..plan import plan
from ..seams import asked_no_weight_decay, refuse_prefix, set_grid
from .clips import MODE, along, check_clips, cut, fitted, grid_of


class PatchEmbed(nn.Module):
    """Patches of clips."""

    def __init__(self, in_chans: int, dim: int, patch: int, tubelet: int, **factory: Any) -> None:
        super().__init__()
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(in_chans, dim, size, size, **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Clips `(B, C, T, H, W)` to `(B, t, h*w, C)`, and the grid of a frame."""
        return cut(x, self.proj)


class VideoMamba(nn.Module):
    """The model: clips `(B, C, T, H, W)` of any size and length to logits.

    Args:
        embed_dim, depth: C and the blocks.
        num_heads: of mechanisms that have heads.
        attention, attention_options: the mechanism; a plan, as of `create_model`.
        frames, img_size: what tables of places are made for.
        tubelet: frames of a patch.
        drop_path_rate: stochastic depth of the last block; it grows from 0 at the first.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        attention: str = "bimamba",
        attention_options: Mapping[str, Any] | None = None,
        num_heads: int = 1,
        in_chans: int = 3,
        num_classes: int = 400,
        frames: int = 8,
        img_size: int | tuple[int, int] = 224,
        tubelet: int = 1,
        drop_path_rate: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        for name, value in (("frames", frames), ("tubelet", tubelet)):
            if value < 1:
                raise LinsightError(f"{name}={value} must be 1 or more")
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, embed_dim
        self.grid = grid_of(to_2tuple(img_size), 16)
        (choices,) = plan(attention, [depth], attention_options)
        refuse_prefix(choices, "take a mechanism that has one, this model has a class token")
        self.patch_embed = PatchEmbed(in_chans, embed_dim, 16, tubelet, **factory)
        count, times = self.grid[0] * self.grid[1], -(-frames // tubelet)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + count, embed_dim, **factory))
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, times, embed_dim, **factory))
        trunc_normal_(self.pos_embed, std=0.02)
        tall = (times * self.grid[0], self.grid[1])
        self.layers = mixers(choices, embed_dim, num_heads, grid=tall, drop_path_rate=drop_path_rate, **factory)
        self.norm_f = WideRMSNorm(embed_dim, eps=Mixer.eps, **factory)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes else nn.Identity()
        self.apply(init_linear)
        self.grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` to normed tokens `(B, 1 + t*h*w, C)`, the class token first."""
        check_clips(self, x)
        x, frame = self.patch_embed(x)
        times, tile = x.shape[1], Tile.whole(frame)
        placed = with_positions(x.flatten(0, 1), self.pos_embed[:, 1:], self.grid, tile, MODE)
        x = placed.unflatten(0, x.shape[:2]) + along(self.temporal_pos_embedding, times)[:, :, None]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x, grid = torch.cat([first, x.flatten(1, 2)], dim=1), Grid(times * frame.height, frame.width, 1)
        for block in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, use_reentrant=False)
            else:
                x = block(x, grid)
        return self.norm_f(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of those tokens, or the class token."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` to logits `(B, classes)`."""
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A new head, for `num_classes` classes, or none (0)."""
        check_whole(0, num_classes=num_classes)
        like = self.cls_token
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The grid of the table of places in a frame."""
        return {"pos_embed": self.grid}

    def fit_table(self, name: str, table: Tensor, old: tuple[int, int] | None = None) -> FittedTable | None:
        """A published table of the grid `old`, of a square one where that is None, or of other times, made ours."""
        if name == "pos_embed":
            return fitted(table, old, self.grid, prefix=1)
        if name != "temporal_pos_embedding" or table.ndim != 3:
            return None
        times = self.temporal_pos_embedding.shape[1]
        return FittedTable(along(table, times), (table.shape[1], 1), (times, 1))

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample what lies on the grid of a frame to another height and width, in patches."""
        found = fitted(self.pos_embed.detach(), self.grid, grid, prefix=1)
        assert found is not None
        self.pos_embed, self.grid = nn.Parameter(found.tensor, self.pos_embed.requires_grad), grid
        set_grid(self.layers, (self.temporal_pos_embedding.shape[1] * grid[0], grid[1]))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample what lies on the grid of a frame to that of clips of `img_size`. Any size works without it, too."""
        self.set_grid(grid_of(whole_size(img_size), 16))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay."""
        stem = r"^(?:patch_embed|cls_token|pos_embed|temporal_pos_embedding)"
        return {"stem": stem, "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside of a block for its gradients."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimiser should not decay, beyond 1-d ones."""
        return {"pos_embed", "cls_token", "temporal_pos_embedding"} | asked_no_weight_decay(self)


def inflated(state: Mapping[str, Tensor], tubelet: int = 1) -> dict[str, Tensor]:
    """Weights of the image model, by published keys, for videos: its kernel is the middle one of `tubelet` frames.

    What is left new is `temporal_pos_embedding`: `load_published(model, inflated(state), strict=False)` loads them.
    """
    key = "patch_embed.proj.weight"
    flat = state[key]
    whole = flat.new_zeros(*flat.shape[:2], tubelet, *flat.shape[2:])
    whole[:, :, tubelet // 2] = flat
    return {**state, key: whole}
