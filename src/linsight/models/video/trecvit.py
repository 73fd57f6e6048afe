"""TRecViT: a gated linear recurrence over time for each place of the frame, then attention within each frame.

Patraucean et al., "TRecViT: A Recurrent Video Transformer" (arXiv 2412.14294), by its published code, with the RG-LRU of
Griffin (De et al., arXiv 2402.19427). A layer is a temporal block, R = 2C channels inside,

    u = RMSNorm(x) (1 + scale),   y = GELU(W_y u),   v = causal conv over time (W_x u)
    g = sigmoid(BD_in v),   a = exp(-8 sigmoid(BD_a v) softplus(a_param))
    h_t = a_t h_(t-1) + sqrt(1 - a_t^2) g_t v_t,   h_0 = g_0 v_0
    x <- x + W_out (h y)

where BD are block-diagonal maps, one block a head, and then a pre-norm block of attention and MLP on the tokens of each
frame, its class token included. It is causal and linear in frames. In space any mechanism stands, softmax as published.
GELU is the approximation by tanh everywhere. The recurrence is computed in float32, or float64 for float64.

Images are filled up to whole patches with zeros at the right and bottom, the position table is resampled to any grid.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from linsight.attention import Rename
from linsight.ops import FittedTable, Grid, Tile, accumulator, full_precision, linear_scan

from ..parts.positions import with_positions
from ..plan import Choice, plan
from ..seams import asked_no_weight_decay, make_block, make_layer, refuse_prefix, set_grid
from .clips import MODE, check_clips, cut, fitted, grid_of

_NORM_EPS = 1e-6
_LEAST = 1 / (4 * 1000.0**2)  # the gradient of a root is as of this where its argument is less
_GELU = partial(nn.GELU, approximate="tanh")


class BlockDiagonal(nn.Module):
    """A linear map of `groups` blocks of channels, each to itself."""

    def __init__(self, dim: int, groups: int, **factory: Any) -> None:
        super().__init__()
        width = dim // groups
        self.w = nn.Parameter(torch.empty(groups, width, width, **factory))
        self.b = nn.Parameter(torch.zeros(groups, width, **factory))
        nn.init.normal_(self.w, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)`; the shape is kept, computed in the dtype of `x`."""
        parts = x.unflatten(-1, (self.w.shape[0], -1))
        return (torch.einsum("...gi,gij->...gj", parts, self.w.to(x.dtype)) + self.b.to(x.dtype)).flatten(-2)


class RGLRU(nn.Module):
    """The recurrence h of v over time, see above.

    Args:
        dim: R.
        groups: blocks of the two gates.
    """

    def __init__(self, dim: int, groups: int, **factory: Any) -> None:
        super().__init__()
        self.input_gate = BlockDiagonal(dim, groups, **factory)
        self.a_gate = BlockDiagonal(dim, groups, **factory)
        self.a_param = nn.Parameter(torch.empty(dim, **factory))
        with torch.no_grad():
            least, most = 0.5**2, 0.999**2  # squares of a, where the gate is half open
            squares = torch.rand_like(self.a_param) * (most - least) + least + 1e-8
            self.a_param.copy_(torch.log(torch.expm1(-0.5 * squares.log())))

    def forward(self, v: Tensor) -> Tensor:
        """`(B, T, ..., R)` to the same shape, in the accumulator's dtype."""
        v = v.to(accumulator(v.dtype))
        with full_precision(v):
            decay = -8.0 * self.a_gate(v).sigmoid() * F.softplus(self.a_param.to(v.dtype))  # log a
            write = self.input_gate(v).sigmoid() * v
            scale = _root(-torch.expm1(2 * decay))
            write = torch.cat([write[:, :1], (scale * write)[:, 1:]], dim=1)
            return linear_scan(decay.exp(), write)


def _root(x: Tensor) -> Tensor:
    """sqrt(x), whose gradient is 1000 at most."""
    steep = x * (0.5 * _LEAST**-0.5)
    steep = steep + (x.detach().sqrt() - steep.detach())  # the value of the one, the gradient of the other
    return torch.where(x < _LEAST, steep, x.clamp(min=_LEAST).sqrt())


class Conv1d(nn.Module):
    """A causal depthwise convolution over time: the last of `width` taps is of the frame itself."""

    def __init__(self, dim: int, width: int, **factory: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(width, dim, **factory))
        self.b = nn.Parameter(torch.zeros(dim, **factory))
        nn.init.normal_(self.w, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, ..., dim)`; the shape is kept, zero before the first frame."""
        width, out = self.w.shape[0], x * self.w[-1] + self.b
        for back in range(1, width):
            past = torch.cat([torch.zeros_like(x[:, :1]).expand(-1, back, *x.shape[2:]), x], dim=1)
            out = out + past[:, : x.shape[1]] * self.w[width - 1 - back]
        return out


class ScaledNorm(nn.Module):
    """RMSNorm times 1 + scale."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)`; the shape is kept."""
        return F.rms_norm(x, self.scale.shape, 1 + self.scale, _NORM_EPS)


class RecurrentBlock(nn.Module):
    """W_out (h y) of normed tokens."""

    def __init__(self, dim: int, groups: int, conv_width: int, **factory: Any) -> None:
        super().__init__()
        self.linear_y = nn.Linear(dim, 2 * dim, **factory)
        self.linear_x = nn.Linear(dim, 2 * dim, **factory)
        self.conv_1d = Conv1d(2 * dim, conv_width, **factory)
        self.rg_lru = RGLRU(2 * dim, groups, **factory)
        self.linear_out = nn.Linear(2 * dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, ..., C)`; the shape is kept."""
        y = F.gelu(self.linear_y(x), approximate="tanh")
        h = self.rg_lru(self.conv_1d(self.linear_x(x)))
        return self.linear_out((h * y).to(y.dtype))


class TemporalBlock(nn.Module):
    """The temporal block: `(B, T, ..., C)`, each place of a frame by itself.

    Args:
        dim: C.
        num_heads: blocks of the gates.
        conv_width: frames that the convolution sees.
    """

    def __init__(self, dim: int, num_heads: int, conv_width: int = 4, **factory: Any) -> None:
        super().__init__()
        self.temporal_pre_norm = ScaledNorm(dim, **factory)
        self.recurrent_block = RecurrentBlock(dim, num_heads, conv_width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream; the shape is kept."""
        return x + self.recurrent_block(self.temporal_pre_norm(x))


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
        self.norm1 = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
        self.attn = make_layer(choice, dim, num_heads, projections="q_k_v", grid=grid, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
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
        refuse_prefix(choices, "take a mechanism that has one, this model has a class token")
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.residualblocks = nn.ModuleList(TemporalBlock(dim, num_heads, conv_width, **factory) for _ in range(depth))
        self.encoderblocks = nn.ModuleList(
            make_block(choice, dim, num_heads, mlp_ratio=mlp_dim / dim, drop_path=rate, grid=grid, **factory)
            or SpatialBlock(choice, dim, num_heads, mlp_dim, grid, rate, **factory)
            for choice, rate in zip(choices, rates, strict=True)
        )
        self.encoder_norm = nn.LayerNorm(dim, eps=_NORM_EPS, **factory)
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
    """Patches of each frame, with places, behind a class token."""

    def __init__(self, in_chans: int, dim: int, patch: int, grid: tuple[int, int], **factory: Any) -> None:
        super().__init__()
        self.grid = grid
        self.embedding = nn.Conv3d(in_chans, dim, (1, patch, patch), (1, patch, patch), **factory)
        self.pos_embedding = nn.Parameter(torch.empty(1, grid[0] * grid[1], dim, **factory))
        self.cls = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        trunc_normal_(self.pos_embedding, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Clips `(B, C, T, H, W)` to tokens `(B, T, 1 + h*w, C)` and the grid of a frame."""
        x, grid = cut(x, self.embedding)
        tile = Tile.whole(grid)
        placed = with_positions(x.flatten(0, 1), self.pos_embedding, self.grid, tile, MODE)
        first = self.cls.to(placed.dtype).expand(placed.shape[0], -1, -1)
        return torch.cat([first, placed], dim=1).unflatten(0, x.shape[:2]), grid._replace(prefix=1)

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
        """Class tokens `(B, T, C)` to `(B, classes)`, or to what the classes are made of."""
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
        self.tokenizer = Tokenizer(in_chans, embed_dim, 16, grid, **factory)
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
        self.decoder = Decoder(embed_dim, 3072, num_classes, **factory)

    def forward_features(self, x: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` to normed tokens `(B, T, 1 + h*w, C)`."""
        check_clips(self, x)
        return self.encoder(*self.tokenizer(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Those tokens to logits, or to the 3072 features that these are made of."""
        return self.decoder(x[:, :, 0], pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` to logits `(B, classes)`."""
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A new head, for `num_classes` classes, or none (0)."""
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside of a layer for its gradients."""
        self.encoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimiser should not decay, beyond 1-d ones."""
        return {"tokenizer.pos_embedding", "tokenizer.cls"} | asked_no_weight_decay(self)
