"""TRecViT: a gated linear recurrence over time for each place of the frame, then attention within each frame.

Patraucean et al., "TRecViT: A Recurrent Video Transformer" (arXiv 2412.14294), by its published code, with the RG-LRU
of Griffin (De et al., arXiv 2402.19427). A layer is a temporal block, R = 2C channels inside,

    u = RMSNorm(x) (1 + scale),   y = GELU(W_y u),   v = causal conv over time (W_x u)
    g = sigmoid(BD_in v),   a = exp(-8 sigmoid(BD_a v) softplus(a_param))
    h_t = a_t h_(t-1) + sqrt(1 - a_t^2) g_t v_t,   h_0 = g_0 v_0
    x <- x + W_out (h y)

where BD are block-diagonal maps, one block a head, and then a pre-norm block of attention and MLP on the tokens of each
frame, its class token included. It is causal and linear in frames. In space any mechanism stands, softmax as published;
with one that works on grids alone there is no class token, and the mean of a frame is read in its place.
GELU is the approximation by tanh everywhere. The recurrence is computed in float32, or float64 for float64.

Images are filled up to whole patches with zeros at the right and bottom, the position table is resampled to any grid.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linsight.attention import Rename
from linsight.ops import FittedTable, Grid, Tile

from ..doors import check_whole, whole_size
from ..parts.positions import with_positions
from ..plan import Choice, plan
from ..seams import asked_no_weight_decay, have_prefix, make_block, make_layer, set_grid
from .clips import MODE, check_clips, cut, fitted, grid_of
from .recurrent import NORM_EPS, TemporalBlock

_GELU = partial(nn.GELU, approximate="tanh")


class SpatialBlock(nn.Module):
    """Pre-norm attention and MLP of the tokens of a frame."""

    published = (
        Rename("LayerNorm_0.", "norm1."),
        Rename("LayerNorm_1.", "norm2."),
        *(Rename(f"MlpBlock_0.Dense_{i}.", f"mlp.fc{i + 1}.") for i in range(2)),
        Rename("MultiHeadDotProductAttention_0.", "attn."),
        *(Rename(f"MultiHeadDotProductAttention_0.{name}.", f"attn.{name[0]}.") for name in ("query", "key", "value")),
        Rename("MultiHeadDotProductAttention_0.out.", "attn.proj."),
    )

    def __init__(
        self, choice: Choice, dim: int, num_heads: int, hidden: int, grid: tuple[int, int], rate: float, **factory: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.attn = make_layer(choice, dim, num_heads, projections="q_k_v", grid=grid, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.mlp = Mlp(dim, hidden, act_layer=_GELU, **factory)
        self.drop_path = DropPath(rate)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample tables of the mechanism."""
        self.attn.set_grid(grid)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Frames `(B, P + h*w, C)`; the shape is kept."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """The layers and a norm."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        mlp_dim: int,
        grid: tuple[int, int],
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        conv_width: int = 4,
        drop_path_rate: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        (choices,) = plan(attention, [depth], attention_options)
        self.has_class_token = have_prefix(choices)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.residualblocks = nn.ModuleList(TemporalBlock(dim, num_heads, conv_width, **factory) for _ in range(depth))
        self.encoderblocks = nn.ModuleList(
            make_block(choice, dim, num_heads, mlp_ratio=mlp_dim / dim, drop_path=rate, grid=grid, **factory)
            or SpatialBlock(choice, dim, num_heads, mlp_dim, grid, rate, **factory)
            for choice, rate in zip(choices, rates, strict=True)
        )
        self.encoder_norm = nn.LayerNorm(dim, eps=NORM_EPS, **factory)
        self.grad_checkpointing = False

    @property
    def published(self) -> tuple[Rename, ...]:
        """Published names of the blocks, which are numbered in two ways."""
        depth = range(len(self.encoderblocks))
        return (
            *(Rename(f"residualblock_{i:02}.", f"residualblocks.{i}.") for i in depth),
            *(Rename(f"encoderblock_{i}.", f"encoderblocks.{i}.") for i in depth),
        )

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens `(B, T, N, C)` of frames that lie as `grid` says, its prefix first; the shape is kept."""
        for blocks in zip(self.residualblocks, self.encoderblocks, strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, x, grid, blocks, use_reentrant=False)
            else:
                x = self._layer(x, grid, blocks)
        return self.encoder_norm(x)

    def _layer(self, x: Tensor, grid: Grid, blocks: tuple[nn.Module, nn.Module]) -> Tensor:
        temporal, spatial = blocks
        x = temporal(x)
        return spatial(x.flatten(0, 1), grid).unflatten(0, x.shape[:2])


class Tokenizer(nn.Module):
    """Patches of each frame, with places, behind a class token where it has one."""

    def __init__(
        self, in_chans: int, dim: int, patch: int, grid: tuple[int, int], class_token: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embedding = nn.Conv3d(in_chans, dim, (1, patch, patch), (1, patch, patch), **factory)
        self.pos_embedding = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim, **factory))
        self.cls = nn.Parameter(torch.zeros(1, 1, dim, **factory)) if class_token else None
        trunc_normal_(self.pos_embedding, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Clips `(B, C, T, H, W)` to tokens `(B, T, P + h*w, C)` and the grid of a frame."""
        x, grid = cut(x, self.embedding)
        tile = Tile.whole(grid)
        placed = with_positions(x.flatten(0, 1), self.pos_embedding, self.grid, tile, MODE)
        if self.cls is not None:
            first = self.cls.to(placed.dtype).expand(placed.shape[0], -1, -1)
            placed, grid = torch.cat([first, placed], dim=1), grid._replace(prefix=1)
        return placed.unflatten(0, x.shape[:2]), grid

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The grid of the position table."""
        return {"pos_embedding": self.grid}

    def fit_table(self, name: str, table: Tensor, old: tuple[int, int] | None = None) -> FittedTable | None:
        """A published table of the grid `old`, of a square one where that is None, resampled to ours."""
        return fitted(table, old, self.grid) if name == "pos_embedding" else None

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the position table, for good."""
        found = fitted(self.pos_embedding.detach(), self.grid, grid)
        assert found is not None
        self.pos_embedding, self.grid = nn.Parameter(found.tensor, self.pos_embedding.requires_grad), grid


class Decoder(nn.Module):
    """The mean over frames of tanh(W x), and classes."""

    def __init__(self, dim: int, hidden: int, num_classes: int, **factory: Any) -> None:
        super().__init__()
        self.pre_logits = nn.Linear(dim, hidden, **factory)
        self.cls_head = nn.Linear(hidden, num_classes, **factory) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A token of each frame, `(B, T, C)`, to `(B, classes)`, or to what the classes are made of."""
        x = self.pre_logits(x).tanh().mean(1)
        return x if pre_logits else self.cls_head(x)


class TRecViT(nn.Module):
    """The model: clips `(B, C, T, H, W)` of any size and length to logits; those of several clips are averaged outside.

    Args:
        embed_dim, depth, num_heads, mlp_dim: C, layers, heads, and channels inside of an MLP.
        attention, attention_options: the mechanism on each frame; a plan, as of `create_model`.
        img_size: what position tables are made for.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        num_classes: int = 400,
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        grid = grid_of(to_2tuple(img_size), 16)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, embed_dim
        self.encoder = Encoder(
            embed_dim,
            depth,
            num_heads,
            mlp_dim=mlp_dim,
            grid=grid,
            attention=attention,
            attention_options=attention_options,
            drop_path_rate=drop_path_rate,
            **factory,
        )
        self.tokenizer = Tokenizer(in_chans, embed_dim, 16, grid, self.encoder.has_class_token, **factory)
        self.decoder = Decoder(embed_dim, 3072, num_classes, **factory)

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` to normed tokens `(B, T, P + h*w, C)`, P 1 with a class token and else 0."""
        check_clips(self, x)
        return self.encoder(*self.tokenizer(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of those tokens, or the 3072 features that these are made of."""
        return self.decoder(x.mean(2) if self.tokenizer.cls is None else x[:, :, 0], pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` to logits `(B, classes)`."""
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A new head, for `num_classes` classes, or none (0)."""
        check_whole(0, num_classes=num_classes)
        like = self.decoder.pre_logits.weight
        self.num_classes = num_classes
        self.decoder.cls_head = (
            nn.Linear(like.shape[0], num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample what lies on the grid of a frame to another height and width, in patches."""
        set_grid(self, grid)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample what lies on the grid of a frame to that of clips of `img_size`. Any size works without it, too."""
        self.set_grid(grid_of(whole_size(img_size), 16))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.decoder.cls_head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay."""
        blocks = [(r"^encoder\.(?:residual|encoder)blocks\.(\d+)", None), (r"^encoder\.encoder_norm", (99999,))]
        return {"stem": r"^tokenizer", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside of a layer for its gradients."""
        self.encoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimiser should not decay, beyond 1-d ones."""
        return {"tokenizer.pos_embedding", "tokenizer.cls"} | asked_no_weight_decay(self)
