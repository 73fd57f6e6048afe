"""The ViT and DeiT host: timm's VisionTransformer with any mechanism and any image size.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (arXiv 2010.11929); Touvron et al.,
"Training data-efficient image transformers", ICML 2021 (arXiv 2012.12877). Every mechanism, of quadratic
cost or linear, sees the whole grid and the class token.

Any image size: what differs from timm's class is that blocks are given the grid of their tokens with the
call (so checkpointing and compilation see it), that images are padded at the right and bottom to whole
patches, and that the position table is resampled (bicubic) to their grid. Images of different sizes make one batch
padded (`model(x, sizes=...)`) or packed (`model.forward_packed(images)`); each gets what it gets alone.

Two designs of the residual stream go with any mechanism, and with each other. `norm="siamese"` keeps two streams
that share every branch (SiameseNorm, arXiv 2602.08064). `steps=[(96, 4), (192, 8)]` widens the stream: blocks of the
first step see 96 channels, later ones those and fresh ones (StepsNet, arXiv 2511.14329, which published the budgets
of its DeiT but not the widths: those of `steps_deit_*` are ours). Features taken between blocks are of the merged and
whole tensor.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, to_2tuple, trunc_normal_
from timm.models import deit as timm_deit
from timm.models import vision_transformer as timm_vit
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from linsight.attention import OnGrid, Rename, recast
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout, LayoutLike, Tile, is_proxy, unflatten

from ...doors import check_whole
from ...parts.convs import WholePatches
from ...parts.images import FORMATS, check_format, check_images, check_pool, in_format, refuse_fx
from ...parts.indices import Indices, in_order
from ...parts.keys import AnyKeys
from ...parts.positions import with_positions
from ...parts.siamese import Merge, Pair
from ...parts.stepsnet import Steps, block_widths, check_last, opened, widened
from ...plan import plan
from ...seams import asked_no_weight_decay, refuse_for_block, refuse_prefix, set_grid
from ...steps import StreamPlan
from .batches import classify, embed_packed, embed_padded
from .blocks import host_arguments
from .steps import vit_plan

_INIT_NORM = Rename("init_norm.", "patch_embed.norm.")
# At the end of the published SiameseNorm, unlike in its blocks, pre is x and post is y.
_SIAMESE = (
    Rename("pre_norm.", "norm_pair.norm_x."),
    Rename("post_norm.", "norm_pair.norm_y."),
    Rename("final_norm.", "norm."),
)


class VisionTransformer(AnyKeys, OnGrid, timm_vit.VisionTransformer):
    """timm's VisionTransformer, all its arguments, and

    attention: a mechanism, or `"inline:4/softmax"` for the first 4 blocks and the rest.
    attention_options: keyword arguments of that mechanism.
    cpe: a depthwise convolution in front of each block, beside `pos_embed` or in its place ("none").
    norm: "pre", or "siamese" for two residual streams.
    steps: `(width, number of blocks)` of each step, the last as wide as the model, in place of `depth`; a head is as
        wide in all of them.
    border: patches of zeros on each side of an image, which are tokens as all others, in maps of features too.
    """

    map_formats = (*FORMATS, "NLC")
    norm_pair: Merge | None
    patch_embed: Any

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *timm_args: Any,
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        cpe: bool = False,
        norm: str = "pre",
        steps: Steps | None = None,
        border: int = 0,
        depth: int = 12,
        **timm_kwargs: Any,
    ) -> None:
        depth = depth if steps is None else len(block_widths(steps))
        check_pool(timm_kwargs.get("global_pool", "token"), _pools(timm_kwargs.get("class_token", True)))
        (choices,) = plan(attention, [depth], attention_options)
        (height, width), (down, right) = to_2tuple(img_size), to_2tuple(patch_size)
        if timm_kwargs.get("fix_init"):
            for choice in choices:
                refuse_for_block(choice, {"fix_init": True}, {})
        more: dict[str, Any] = {"cpe": cpe, "norm": norm, "steps": steps, "border": border}
        ours = host_arguments(choices, (height // down, width // right), timm_kwargs, **more)
        super().__init__(img_size, patch_size, *timm_args, depth=depth, **{**timm_kwargs, **ours})
        self._set_parts(norm, steps)
        if self.num_prefix_tokens:
            refuse_prefix(choices, "pass class_token=False, global_pool='avg'")
        if not isinstance(self.patch_drop, nn.Identity):
            raise LinsightError("dropped patches leave no grid: pass patch_drop_rate=0")

    @staticmethod
    def adopt(
        model: timm_vit.VisionTransformer, *, norm: str = "pre", steps: Steps | None = None
    ) -> "VisionTransformer":
        """A VisionTransformer, distilled or not, that timm built with `host_arguments`, as one of ours.

        `norm` and `steps` are those that it was built with.
        """
        kinds = {timm_vit.VisionTransformer: VisionTransformer, timm_deit.VisionTransformerDistilled: Distilled}
        if type(model) not in kinds:
            raise LinsightError(f"the ViT host cannot take over a {type(model).__name__}")
        ours = recast(model, kinds[type(model)])
        ours._set_parts(norm, steps)
        return ours

    def _set_parts(self, norm: str, steps: Steps | None) -> None:
        """Set how images are cut, the width that each block takes, and how two streams are merged behind them."""
        if type(self.patch_embed) is PatchEmbed:
            self.patch_embed = recast(self.patch_embed, WholePatches)
        if steps is not None:
            check_last(steps, self.embed_dim)
        self.widths = [self.embed_dim] * len(self.blocks) if steps is None else block_widths(steps)
        self.norm_pair = None
        if norm == "siamese":
            last = self.fc_norm if isinstance(self.norm, nn.Identity) else self.norm
            if isinstance(last, nn.Identity):
                raise LinsightError("two streams are merged by norms: pass final_norm=True, or norm='pre'")
            self.norm_pair = Merge(copy.deepcopy(last), copy.deepcopy(last))

    @property
    def published(self) -> tuple[Rename, ...]:
        """Published names of what is outside the blocks, and of the blocks, where these tell them."""
        around: tuple[Rename, ...] = getattr(next(iter(self.blocks), None), "published_model", ())
        return (*around, _INIT_NORM) if self.norm_pair is None else (*around, _INIT_NORM, *_SIAMESE)

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The grid of the position table."""
        return {} if self.pos_embed is None else {"pos_embed": self.patch_embed.grid_size}

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's, with the class token at the published standard deviation of 0.02."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, for `num_classes` classes, or none (0), on tokens pooled in another way."""
        check_whole(0, num_classes=num_classes)
        if global_pool is not None:
            check_pool(global_pool, _pools(self.has_class_token, self.attn_pool is not None))
        super().reset_classifier(num_classes, global_pool)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the tokens after the blocks `indices` do not need; their places, in order."""
        taken: list[int] = super().prune_intermediate_layers(
            in_order(indices, len(self.blocks)), prune_norm, prune_head
        )
        return taken

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """timm's; the tables of mechanisms are resampled too."""
        super().set_input_size(*args, **kwargs)
        set_grid(self.blocks, self.patch_embed.grid_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's names, and what the mechanisms ask for."""
        return super().no_weight_decay() | asked_no_weight_decay(self)

    def stream_plan(self) -> StreamPlan:
        """The steps that an image goes through in tiles."""
        return vit_plan(self)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        sizes: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> Any:
        """Images `(B, 3, H, W)` of any size -> logits `(B, classes)`.

        `sizes` `(B, 2)` is the height and width of each image in pixels, where a batch is padded at the bottom and
        right. Padding, whatever is in it, has no effect.
        """
        if is_proxy(sizes):
            _refuse_masks(None, False, sizes)
        elif sizes is not None:
            _refuse_masks(attn_mask, is_causal)
            x, layout = embed_padded(self, x, sizes)
            return classify(self, self._normed(x, layout), layout)
        return super().forward(x, attn_mask, is_causal)

    def forward_packed(self, images: Sequence[Tensor], *, pre_logits: bool = False) -> Any:
        """Images `(3, H_i, W_i)`, each of a size of its own -> logits `(images, classes)`, without any padding."""
        x, layout = self.forward_features_packed(images)
        return classify(self, x, layout, pre_logits)

    def forward_features_packed(self, images: Sequence[Tensor]) -> tuple[Tensor, Layout]:
        """Images `(3, H_i, W_i)` -> normed tokens `(1, sum of N_i, C)` and how they lie, for `linsight.ops.unpack`."""
        x, layout = embed_packed(self, images)
        return self._normed(x, layout), layout

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        sizes: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Images `(B, 3, H, W)` of any size -> normed tokens `(B, P + h*w, C)`; `sizes` as of `forward`."""
        if sizes is None:
            return self._normed(*self._embed(x, attn_mask, is_causal))
        _refuse_masks(attn_mask, is_causal)
        return self._normed(*embed_padded(self, x, sizes))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
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
        check_format(output_fmt, self.map_formats)
        take = in_order(indices, len(self.blocks))
        x, grid = self._embed(x, attn_mask, is_causal)
        x, taken = self._through(self.blocks[: take[-1] + 1] if stop_early else self.blocks, x, grid, take)
        prefixes, maps = [], []
        for tokens in map(self.norm, taken) if norm else taken:
            prefix, spatial = tokens[:, : grid.prefix], tokens[:, grid.prefix :]
            if output_fmt != "NLC":
                spatial = unflatten(spatial, 1, (grid.height, grid.width)).permute(0, 3, 1, 2).contiguous()
                spatial = in_format(spatial, output_fmt)
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

    def prefix_tokens(self) -> Tensor | None:
        """`(1, P, C)`, the tokens in front of the grid, at their places in the table where it has some."""
        first = [t for t in (self.cls_token, self.reg_token, getattr(self, "dist_token", None)) if t is not None]
        if not first:
            return None
        tokens = torch.cat(first, dim=1) if len(first) > 1 else first[0]
        placed = self.pos_embed is not None and not self.no_embed_class
        return tokens + self.pos_embed[:, : self.num_prefix_tokens] if placed else tokens

    def _pos_embed(self, x: Tensor) -> Tensor:
        """As timm's, of a map `(B, h, w, C)`, but the table is resampled by matrices: sizes may be unknown in a graph,
        gradients go through it, and a batch may be empty.
        """
        grid, first, x = Grid(x.shape[1], x.shape[2]), self.prefix_tokens(), x.flatten(1, 2)
        if self.pos_embed is not None:
            table = self.pos_embed if self.no_embed_class else self.pos_embed[:, self.num_prefix_tokens :]
            x = with_positions(x, table, self.patch_embed.grid_size, Tile.whole(grid), "bicubic-antialias")
        if first is not None:
            x = torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1)
        return x if self.pos_embed is None else self.pos_drop(x)

    def _embed(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Grid]:
        _refuse_masks(attn_mask, is_causal)
        check_images(self, x)
        x = self.patch_embed(x)  # (B, h, w, C)
        grid = Grid(x.shape[1], x.shape[2], self.num_prefix_tokens)
        return self.norm_pre(self._pos_embed(x)), grid

    def _normed(self, x: Tensor, layout: LayoutLike) -> Tensor:
        return self.norm(self._through(self.blocks, x, layout)[0])

    def _through(
        self, blocks: nn.Sequential, x: Tensor, layout: LayoutLike, take: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The residual stream `(B, P + H*W, C)` behind `blocks`, and behind each of those to `take`."""
        first, known = opened(x, self.widths, self.embed_dim), (self.widths or [self.embed_dim])[0]
        if self.norm_pair is not None and is_proxy(x):
            refuse_fx("two residual streams")
        stream, taken = first if self.norm_pair is None else Pair.of(first), []
        for i, block in enumerate(blocks):
            stream, known = self._widened(stream, x, self.widths[i], known), self.widths[i]
            stream = checkpoint(block, stream, layout) if self.grad_checkpointing else block(stream, layout)
            if i in take:
                taken.append(self._whole(stream, x, known))
        return self._whole(stream, x, known), taken

    def _widened(self, stream: Tensor | Pair, x: Tensor, width: int, known: int) -> Tensor | Pair:
        if isinstance(stream, Pair):
            return Pair(widened(stream.x, x, width, known), widened(stream.y, x, width, known))
        return widened(stream, x, width, known)

    def _whole(self, stream: Tensor | Pair, x: Tensor, known: int) -> Tensor:
        """The tensor that a stream of `known` channels stands for: all channels, of later steps too; of two, merged."""
        stream = self._widened(stream, x, self.embed_dim, known)
        return self.norm_pair(stream) if isinstance(stream, Pair) and self.norm_pair is not None else stream  # type: ignore[return-value]


def _pools(class_token: bool, attentive: bool = True) -> tuple[str, ...]:
    """timm's ways to pool tokens: of a class token where there is one, by a layer of its own where one may be made."""
    return (*(("token",) if class_token else ()), "avg", "max", "avgmax", *(("map", "prr") if attentive else ()), "")


@torch.fx.wrap  # where a graph is made, they are not known yet: it asks
def _refuse_masks(attn_mask: Tensor | None, is_causal: bool, sizes: Any = None) -> None:
    if sizes is not None:
        raise LinsightError("a graph of torch.fx takes no sizes=: call the model itself, or export it with sizes=")
    if attn_mask is not None or is_causal:
        raise CapabilityError("this host takes no attn_mask or is_causal: its layers take keep= and score_bias=")


class Distilled(VisionTransformer, timm_deit.VisionTransformerDistilled):
    """The host with DeiT's distillation token and its head, for the models of timm that have them."""
