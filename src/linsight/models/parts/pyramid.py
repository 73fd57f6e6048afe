"""The base of the hierarchical hosts: stages that take and give maps, and timm's interface around them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import copied, unflatten

from ..doors import check_whole, whole_size
from ..plan import Choice, plan
from ..seams import asked_no_weight_decay, make_block
from ..steps import MapEnd, Mix, Sample, StreamPlan, sampled
from .images import check_format, check_images, check_pool, check_pooled, in_format
from .indices import Indices, in_order
from .keys import AnyKeys
from .stages import Stage, StageSize, init_linear


class Pyramid(AnyKeys, nn.Module):
    """The base class. A host makes `stem`, calls `grow`, makes `norm` and `head`, then draws the initial weights.

    What is its own are `make_downsample`, `make_block` and perhaps `make_stage`. See `PlainPyramid`.
    """

    output_fmt = "NCHW"
    reduces = False  # the `reduction` of a stage is of use
    attends = True  # every stage does; else not one without heads
    stem: nn.Module
    stages: nn.ModuleList
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes

    def grow(
        self,
        sizes: Sequence[StageSize],
        width: int,
        grid: tuple[int, int],
        *,
        attention: str,
        attention_options: Mapping[str, Any] | None,
        drop_path_rate: float,
        reduction: int = 1,
        **factory: Any,
    ) -> None:
        """Make the stages, on maps of `width` channels and of size `grid`, `reduction` times smaller than images.

        They are described as timm does, in `feature_info`.
        """
        for size in sizes:
            if size.reduction != 1 and not self.reduces:
                raise LinsightError(f"reduction={size.reduction} of a stage has no effect: this host reduces no keys")
        depths = [size.depth for size in sizes]
        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        rows = plan(attention, depths, attention_options)
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for i, (size, row, drop_paths) in enumerate(zip(sizes, rows, rates, strict=True)):
            downsample = self.make_downsample(i, width, size.dim, **factory)
            width, grid, reduction = size.dim, downsample.grid(grid), reduction * downsample.stride
            last = i == len(sizes) - 1
            blocks: list[nn.Module] = []
            for choice, rate in zip(row, drop_paths, strict=True):
                shared = {"drop_path": rate, "grid": grid, **factory}
                whole = None
                if size.num_heads or self.attends:
                    whole = make_block(choice, size.dim, size.num_heads, mlp_ratio=size.mlp_ratio, **shared)
                blocks.append(self.make_block(size, choice, last=last, **shared) if whole is None else whole)
            self.stages.append(self.make_stage(downsample, blocks, width, grid, last=last, **factory))
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{i}"})
        self.num_features = self.head_hidden_size = width

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> Any:
        """The module that makes the tokens of stage `i`, and tells their `grid` and its `stride`."""
        raise NotImplementedError

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """The host's own block around a mechanism; `last`: of the last stage."""
        raise NotImplementedError

    def make_stage(
        self, downsample: nn.Module, blocks: list[nn.Module], dim: int, grid: tuple[int, int], *, last: bool, **_: Any
    ) -> nn.Module:
        """A stage of these parts."""
        return Stage(downsample, blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the mechanisms want kept from weight decay."""
        return asked_no_weight_decay(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise decay."""
        blocks = [(r"^stages\.(\d+)\.(?!blocks)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc  # type: ignore[return-value]

    def check_head(self, num_classes: int, global_pool: str) -> None:
        """Raise unless the head can pool so, and then give classes."""
        check_pool(global_pool)
        check_pooled(global_pool, num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, for `num_classes` classes, or none (0), on the last map pooled in another way."""
        check_whole(0, num_classes=num_classes)
        head: Any = self.head
        self.check_head(num_classes, head.global_pool.pool_type if global_pool is None else global_pool)
        self.num_classes = num_classes
        head.reset(num_classes, global_pool)
        self.head_hidden_size = head.num_features

    def grids(self, size: tuple[int, int]) -> Iterator[tuple[nn.Module, tuple[int, int]]]:
        """Each stage and the height and width of its tokens, for images of `size`."""
        for stage in self.stages:
            size = stage.downsample.grid(size)  # type: ignore[union-attr,operator]
            yield stage, size

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resample position tables, for good, to those of images of `img_size`. Any size works without it, too."""
        if img_size is None:
            return
        height, width = whole_size(img_size)
        for stage, grid in self.grids((height, width)):
            stage.set_grid(grid)  # type: ignore[operator]
        update_model_input_size(self, (height, width))

    def stream_plan(self) -> StreamPlan:
        """The steps that an image goes through in tiles; the stem is one with the first stage's convolution."""
        steps: list[Sample | Mix] = []
        maps: list[MapEnd] = []
        for i, (stage, info) in enumerate(zip(self.stages, self.feature_info, strict=False)):
            parts = (stage.downsample,) if i else (self.stem, stage.downsample)
            (down, right), margin = sampled(*parts)
            width = info["num_chs"]
            steps.append(
                Sample(
                    run=partial(_run_in_turn, parts),
                    size=partial(self._stage_size, i),
                    stride=(down, right),
                    margin=margin,
                    dim=width,
                    place=stage.place,  # type: ignore[arg-type]
                    prefix=stage.prefix_tokens(),  # type: ignore[operator]
                )
            )
            steps += [Mix(block, width) for block in stage.mixes()]  # type: ignore[operator]
            maps.append(MapEnd(len(steps)))
        head = self.head_of_mean if self.pools_mean() else None
        return StreamPlan(tuple(steps), self.norm_tokens, head, maps=tuple(maps))

    def _stage_size(self, i: int, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of stage `i`, of the map before it, or of the image."""
        return next(self.grids(size))[1] if i == 0 else self.stages[i].downsample.grid(size)  # type: ignore[union-attr,operator]

    def norm_tokens(self, x: Tensor) -> Tensor:
        """The final norm, of tokens `(B, N, C)`."""
        return self.norm_map(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    def head_of_mean(self, prefix: Tensor, mean: Tensor, pre_logits: bool) -> Tensor:
        """`forward_head` of the mean of the last map `(B, 1, C)`, as a map of one place."""
        return self.forward_head(mean.transpose(1, 2)[..., None], pre_logits)

    def pools_mean(self) -> bool:
        """True where all that the head reads of the last map is its mean."""
        return self.head.global_pool.pool_type == "avg"  # type: ignore[union-attr]

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` -> the last map `(B, C, h, w)`, normed."""
        check_images(self, x)
        x = last = self.stem(x)
        for stage in self.stages:
            x, last = self.run_stage(stage, x)
        return self.norm_features(last)

    def run_stage(self, stage: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map after a stage, and what `forward_features` goes on with where it is the last: here the same."""
        x = stage(x)
        return x, x

    def norm_features(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.norm_map(x)

    def norm_map(self, x: Tensor) -> Tensor:
        """The final norm, over the channels of a map."""
        if isinstance(self.norm, nn.LayerNorm):
            return copied(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, of the output of `forward_features`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """As timm's: the maps after the stages `indices` (`norm`: the last one normed), and the final features."""
        check_format(output_fmt)
        take = in_order(indices, len(self.stages))
        check_images(self, x)
        x = last_features = self.stem(x)
        maps = []
        final = len(self.feature_info) - 1
        for i, stage in enumerate(self.stages[: take[-1] + 1] if stop_early else self.stages):
            x, last_features = self.run_stage(stage, x)
            if i in take:
                maps.append(self.norm_map(x) if norm and i == final else x)
        maps = [in_format(x, output_fmt) for x in maps]
        if intermediates_only:
            return maps
        return self.norm_features(last_features) if i == final else x, maps

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps `indices` do not need; their places, in order."""
        take = in_order(indices, len(self.stages))
        cut = take[-1] < len(self.stages) - 1
        self.stages = self.stages[: take[-1] + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[take[-1]]["num_chs"]
        if prune_head or cut:
            head: Any = self.head
            head.reset(0, "", reset_other=True, in_features=self.num_features)  # its norm, too
            self.num_classes, self.head_hidden_size = 0, head.num_features
        return take


def _run_in_turn(parts: Sequence[Any], x: Tensor) -> Tensor:
    """Run the modules in front of a stage, the last of which makes tokens: `(B, C, H, W)` -> `(B, h, w, C')`."""
    for part in parts[:-1]:
        x = part(x)
    tokens, grid = parts[-1](x)
    return unflatten(tokens, 1, (grid.height, grid.width))


class PlainPyramid(Pyramid):
    """A pyramid without a stem of its own, that ends in a norm, the mean of the last map and a linear layer.

    Args:
        stages: the `StageSize` of each stage; plain tuples do.
        attention: a mechanism, one a stage, or the first k blocks of a stage (see `plan`).
        img_size: what tables on the grid of tokens are made for; any size works.
    """

    def __init__(
        self,
        *,
        stages: Sequence[StageSize],
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = nn.Identity()
        self.grow(
            [StageSize(*stage) for stage in stages],
            in_chans,
            to_2tuple(img_size),
            attention=attention,
            attention_options=attention_options,
            drop_path_rate=drop_path_rate,
            **factory,
        )
        self.check_head(num_classes, global_pool)
        self.norm = self.make_norm(self.num_features, **factory)
        head = self.make_head(self.num_features, num_classes, global_pool, drop_rate, **factory)
        self.head, self.head_hidden_size = head, head.num_features
        self.apply(init_linear)

    def make_norm(self, dim: int, **factory: Any) -> nn.Module:
        """The final norm, of maps."""
        return nn.LayerNorm(dim, **factory)

    def make_head(self, dim: int, num_classes: int, global_pool: str, drop_rate: float, **factory: Any) -> Any:
        """The classifier of the last map, normed; it tells `num_features`, those of the linear layer."""
        return ClassifierHead(dim, num_classes, global_pool, drop_rate=drop_rate, **factory)
