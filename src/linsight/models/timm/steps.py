"""The steps of the Swin and PVTv2 hosts, which are timm's classes, for streaming."""

from typing import Any

from torch import Tensor, nn

from linsight.errors import CapabilityError

from ..steps import MapEnd, Mix, Sample, StreamPlan, sampled


def swin_plan(model: Any) -> StreamPlan:
    """Patches, then of each stage the merging of patches and the blocks, none of which may have windows."""
    down, right = model.patch_embed.patch_size
    start = Sample(
        run=model.patch_embed,
        size=lambda size: (-(-size[0] // down), -(-size[1] // right)),
        stride=(down, right),
        margin=0,
        dim=model.embed_dim,
    )
    steps: list[Sample | Mix] = [start]
    maps: list[MapEnd] = []
    for stage in model.layers:
        if not isinstance(stage.downsample, nn.Identity):
            steps.append(_merging(stage.downsample))
        for block, width in zip(stage.blocks, stage.widths, strict=True):
            if getattr(block, "window", None) is not None:
                raise CapabilityError(
                    "windows of this Swin do not stream: build it with a mechanism of linear cost in every stage, "
                    "attention_window=None, so that each block sees the whole grid"
                )
            steps.append(Mix(block, width))
        maps.append(MapEnd(len(steps)))

    def head(prefix: Tensor, mean: Tensor, pre_logits: bool) -> Tensor:
        return model.forward_head(mean[:, None], pre_logits=pre_logits)

    pools = model.head.global_pool.pool_type == "avg"
    return StreamPlan(tuple(steps), model.norm, head if pools else None, maps=tuple(maps))


def _merging(merging: nn.Module) -> Sample:
    """2x2 tokens to one, which sees no others."""
    return Sample(
        run=lambda x: merging(x.permute(0, 2, 3, 1)),
        size=lambda size: (-(-size[0] // 2), -(-size[1] // 2)),
        stride=(2, 2),
        margin=0,
        dim=merging.reduction.out_features,  # type: ignore[union-attr,arg-type]
    )


def pvt_v2_plan(model: Any) -> StreamPlan:
    """Overlapping patches and blocks, stage by stage; the norm of a stage is what the next one begins with."""
    steps: list[Sample | Mix] = []
    maps: list[MapEnd] = []
    norm: Any = None
    for i, stage in enumerate(model.stages):
        embed = stage.downsample if i else model.patch_embed
        stride, margin = sampled(embed)
        width = embed.proj.out_channels
        steps.append(
            Sample(
                run=_after_norm(norm, embed),
                size=lambda size, stride=stride: (-(-size[0] // stride[0]), -(-size[1] // stride[1])),  # type: ignore[misc]
                stride=stride,
                margin=margin,
                dim=width,
            )
        )
        steps += [Mix(block, width) for block in stage.blocks]
        norm = stage.norm
        maps.append(MapEnd(len(steps), norm))

    def head(prefix: Tensor, mean: Tensor, pre_logits: bool) -> Tensor:
        return model.forward_head(mean.transpose(1, 2)[..., None], pre_logits=pre_logits)

    return StreamPlan(tuple(steps), norm, head if model.global_pool == "avg" else None, maps=tuple(maps))


def _after_norm(norm: Any, embed: Any) -> Any:
    if norm is None:
        return embed
    return lambda x: embed(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
