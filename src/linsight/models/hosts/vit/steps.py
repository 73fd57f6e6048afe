"""The steps of the ViT host for streaming."""

from typing import Any

import torch
from torch import Tensor, nn

from linsight.ops import Grid, Tile, table_for

from ...parts.siamese import Pair
from ...steps import MapEnd, Mix, Sample, StreamPlan


class OnePair(nn.Module):
    """A block between two streams, of their first `width` channels, for both side by side."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.block, self.width = block, width

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """`(1, N, 2C)`; the shape is kept."""
        streams = x.chunk(2, dim=-1)
        done = self.block(Pair(*(stream[..., : self.width] for stream in streams)), grid)
        return torch.cat([p for own, old in zip(done, streams, strict=True) for p in (own, old[..., self.width :])], -1)


def vit_plan(model: Any) -> StreamPlan:
    """Patches, blocks, norm; logits of the class token or of the mean."""
    embed, first, pair = model.patch_embed, model.num_prefix_tokens, model.norm_pair
    (down, right), rim = embed.patch_size, 2 * embed.border

    def doubled(x: Tensor) -> Tensor:
        return x if pair is None else torch.cat([x, x], dim=-1)

    def place(x: Tensor, tile: Tile) -> Tensor:
        if model.pos_embed is not None:
            table = model.pos_embed if model.no_embed_class else model.pos_embed[:, first:]
            x = x + table_for(table, embed.grid_size, tile, "bicubic-antialias").to(table.dtype)
        return doubled(model.norm_pre(x))

    def norm(x: Tensor) -> Tensor:
        return model.norm(x if pair is None else pair(Pair(*x.chunk(2, dim=-1))))

    def head(prefix: Tensor, mean: Tensor, pre_logits: bool) -> Tensor:
        return model.forward_head(torch.cat([prefix, mean], dim=1), pre_logits=pre_logits)

    prefix = None
    if first:  # timm's own way of a map of one token: which tokens there are, is its business
        weight = embed.proj.weight
        prefix = doubled(model.norm_pre(model._pos_embed(weight.new_zeros(1, 1, 1, model.embed_dim))[:, :first]))
    start = Sample(
        run=embed,
        size=lambda size: (-(-size[0] // down) + rim, -(-size[1] // right) + rim),
        stride=(down, right),
        margin=rim,  # twice what a crop spoils: the last border reads no pixel, and a crop has some
        dim=model.embed_dim * (1 if pair is None else 2),
        place=place,
        prefix=prefix,
    )
    blocks = (
        Mix(block, width) if pair is None else Mix(OnePair(block, width), start.dim)
        for block, width in zip(model.blocks, model.widths, strict=True)
    )
    pools = model.global_pool in ("token", "avg") and model.attn_pool is None and not model.pool_include_prefix
    steps: tuple[Sample | Mix, ...] = (start, *blocks)
    maps = () if pair is not None else tuple(MapEnd(done) for done in range(2, len(steps) + 1))
    return StreamPlan(steps, norm, head if pools else None, maps=maps)
