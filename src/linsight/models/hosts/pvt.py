"""The PVT host: Wang et al., "Pyramid Vision Transformer", ICCV 2021 (arXiv 2102.12122).

Four stages of pre-norm blocks on tokens, each behind a convolution whose kernel is its stride (4, 2, 2, 2),
LayerNorm and a learned position table. Keys and values of a mechanism of quadratic cost are reduced by a
strided convolution (8, 4, 2, 1); the others see every token. Published in two forms: with a class token in
the last stage and a final norm, or, as host of linear attention, with the mean of the last map and no norm.

Any image size: strides round downwards, and a map smaller than its kernel is first padded to it. The table
is resampled (bilinear, as published) to any other grid; the published code fails where a later grid has as
many tokens as the first one was built for, this one does not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.layers import ClassifierHead, Mlp, to_2tuple, trunc_normal_
from timm.models._input import update_model_args
from torch import Tensor, nn

from linsight.attention import OnGrid, Rename
from linsight.errors import LinsightError, UnknownNameError
from linsight.ops import FittedTable, Grid, Tile, fit_grid, fit_square, table_for

from ..doors import check_whole
from ..parts.convs import ConvEmbed
from ..parts.images import POOLS, check_pool
from ..parts.positions import with_positions
from ..parts.pyramid import Pyramid
from ..parts.stages import PreNorm, Stage, StageSize, as_map, init_linear
from ..plan import Choice, plan
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host, figures
from ..seams import make_layer, refuse_prefix


class PVTStage(OnGrid, Stage):
    """A stage with a position table, and perhaps a class token in front."""

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        dim: int,
        grid: tuple[int, int],
        class_token: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(downsample, blocks)
        factory = {"device": device, "dtype": dtype}
        self.size = grid
        self.prefix = int(class_token)
        self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + grid[0] * grid[1], dim, **factory))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory)) if class_token else None
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                trunc_normal_(table, std=0.02)

    def place(self, x: Tensor, tile: Tile) -> Tensor:
        """With the position table, without prefix."""
        return with_positions(x, self.pos_embed[:, self.prefix :], self.size, tile, "bilinear")

    def prefix_tokens(self) -> Tensor | None:
        """The class token at its place in the table."""
        return None if self.cls_token is None else self.cls_token + self.pos_embed[:, :1]

    def tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """A map to tokens after all blocks, the class token first."""
        x, grid = self.downsample(x)
        x, first = self.place(x, Tile.whole(grid)), self.prefix_tokens()
        if first is not None:
            x, grid = torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1), grid._replace(prefix=1)
        return self.run(x, grid)

    def forward(self, x: Tensor, *, both: bool = False) -> Any:
        """Maps in and out, `(B, C, H, W)`; with `both`, also the tokens, the class token first."""
        x, grid = self.tokens(x)
        return (as_map(x, grid), x) if both else as_map(x, grid)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Move the table to another grid, as the forward would resample it."""
        super().set_grid(grid)
        first, places = self.pos_embed[:, : self.prefix], self.pos_embed[:, self.prefix :]
        moved = table_for(places, self.size, Tile.whole(Grid(*grid)), "bilinear").to(places.dtype)
        self.pos_embed = nn.Parameter(torch.cat([first, moved], dim=1).detach(), self.pos_embed.requires_grad)
        self.size = grid

    def table_grids(self) -> dict[str, tuple[int, int]]:
        """The grid of the position table."""
        return {"pos_embed": self.size}

    def fit_table(self, name: str, table: Tensor, old: tuple[int, int] | None = None) -> FittedTable | None:
        """A published table of the grid `old`, of a square one where that is None, resampled to ours.

        From a square bicubic, as InLine's own loader does, which reads no other; else as `set_grid`.
        """
        if name != "pos_embed" or table.ndim != 3:
            return None
        first, places = table[:, : self.prefix], table[:, self.prefix :]
        if old and old[0] != old[1]:
            fitted = fit_grid(places, old, self.size, "bilinear")
        else:
            fitted = fit_grid(places, old, self.size, "bicubic") if old else fit_square(places, self.size, "bicubic")
        return fitted and fitted._replace(tensor=torch.cat([first, fitted.tensor], dim=1))


class Token(nn.Module):
    """In the place of timm's pooling of maps: the first of tokens `(B, N, C)`."""

    pool_type = "token"

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C)`."""
        return x[:, 0]

    def feat_mult(self) -> int:
        """How many times as many channels there are then."""
        return 1


class CarriedNorm(nn.Module):
    """A norm that published checkpoints hold and their model never applies. Not trained, only kept."""

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(dim, **factory))
        self.register_buffer("bias", torch.zeros(dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """`x`."""
        return x


class PyramidVisionTransformer(Pyramid):
    """The host.

    Args:
        stages: width, depth, heads, MLP ratio and reduction of keys of each stage; plain tuples do.
        attention: a mechanism, one a stage, or the first k blocks of a stage (see `plan`).
        img_size: what position tables are made for; any size works.
        global_pool: "token", the class token of the last stage, or what is done to its map: the mean ("avg"), the
            maximum, the mean of both ("avgmax"), or both ("catavgmax"); "" leaves the tokens, or the map.
        class_token: in the last stage; None: where `global_pool` is "token".
        factory: `device` and `dtype`.
        final_norm: applied before the head; or absent; or "carried", in the state but not applied.
    """

    reduces = True
    published = (
        *(Rename(f"patch_embed{i + 1}.", f"stages.{i}.downsample.") for i in range(4)),
        *(Rename(f"pos_embed{i + 1}", f"stages.{i}.pos_embed") for i in range(4)),
        *(Rename(f"block{i + 1}.", f"stages.{i}.blocks.") for i in range(4)),
        Rename("cls_token", "stages.3.cls_token"),
        Rename("head.", "head.fc."),
    )

    def __init__(
        self,
        *,
        stages: Sequence[StageSize],
        attention: str = "softmax",
        attention_options: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "token",
        class_token: bool | None = None,
        final_norm: Literal["applied", "absent", "carried"] = "applied",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__(in_chans, num_classes, **factory)
        sizes = [StageSize(*stage) for stage in stages]
        if final_norm not in ("applied", "absent", "carried"):
            raise UnknownNameError("final_norm", final_norm, ("applied", "absent", "carried"))
        self.class_token = global_pool == "token" if class_token is None else class_token
        self.output_fmt = "NLC" if self.class_token else "NCHW"
        check_pool(global_pool, ("token", *POOLS))
        self.check_head(num_classes, global_pool)
        if self.class_token:
            depths = [size.depth for size in sizes]
            refuse_prefix(plan(attention, depths, attention_options)[-1], "pass global_pool='avg'")
        self.stem = nn.Identity()
        self.grow(
            sizes,
            in_chans,
            to_2tuple(img_size),
            attention=attention,
            attention_options=attention_options,
            drop_path_rate=drop_path_rate,
            **factory,
        )
        width = self.num_features
        norms: dict[str, Callable[[], nn.Module]] = {
            "applied": lambda: nn.LayerNorm(width, eps=1e-6, **factory),
            "absent": nn.Identity,
            "carried": lambda: CarriedNorm(width, **factory),
        }
        self.norm = norms[final_norm]()
        pool = "avg" if global_pool == "token" else global_pool
        head = ClassifierHead(width, num_classes, pool, drop_rate=drop_rate, **factory)
        if global_pool == "token":
            head.global_pool = Token()
        self.head, self.head_hidden_size = head, head.num_features
        self.apply(init_linear)

    def make_downsample(self, i: int, in_dim: int, dim: int, **factory: Any) -> ConvEmbed:
        """A convolution whose kernel is its stride."""
        stride = 2 if i else 4
        return ConvEmbed(in_dim, dim, stride, stride, **factory)

    def make_block(
        self, size: StageSize, choice: Choice, *, drop_path: float, grid: tuple[int, int], last: bool, **factory: Any
    ) -> nn.Module:
        """Pre-norm attention, with the reduction of the stage, and MLP."""
        shared = {"projections": "q_kv", "reduction": size.reduction, "grid": grid, **factory}
        layer = make_layer(choice, size.dim, size.num_heads, **shared)
        mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio), **factory)
        return PreNorm(size.dim, layer, mlp, drop_path=drop_path, eps=1e-6, **factory)

    def make_stage(
        self,
        downsample: nn.Module,
        blocks: list[nn.Module],
        dim: int,
        grid: tuple[int, int],
        *,
        last: bool,
        **factory: Any,
    ) -> PVTStage:
        """A stage with a position table; the last one with the class token."""
        token = last and self.class_token
        return PVTStage(downsample, blocks, dim=dim, grid=grid, class_token=token, **factory)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class token, and what the mechanisms ask for. As published, position tables decay."""
        tokens = {f"stages.{i}.cls_token" for i, stage in enumerate(self.stages) if stage.cls_token is not None}
        return super().no_weight_decay() | tokens

    @property
    def global_pool(self) -> str:
        """How the head pools."""
        return self.head.global_pool.pool_type  # type: ignore[union-attr,return-value]

    def check_head(self, num_classes: int, global_pool: str) -> None:
        """Raise unless the head can pool so, and then give classes; of tokens that are not pooled, each has some."""
        if self.class_token:
            check_pool(global_pool, ("token", *POOLS))
        elif global_pool == "token":
            raise LinsightError(
                "global_pool='token' reads a class token: pass class_token=True, or pool the map, 'avg'"
            )
        else:
            super().check_head(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, for `num_classes` classes, or none (0), on the class token or the last map pooled so."""
        check_whole(0, num_classes=num_classes)
        if global_pool == "token" != self.global_pool:
            self.check_head(num_classes, global_pool)
            self.head.global_pool = Token()
        super().reset_classifier(num_classes, global_pool)
        update_model_args(self, class_token=self.class_token)

    def pools_mean(self) -> bool:
        """True where all that the head reads of the last map is its mean, or nothing."""
        return self.global_pool == "token" or super().pools_mean()

    def run_stage(self, stage: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map after a stage; of the last one also its tokens, the class token first, where there is one."""
        if not isinstance(stage, PVTStage) or not stage.prefix:
            return super().run_stage(stage, x)
        return stage(x, both=True)

    def norm_features(self, x: Tensor) -> Tensor:
        """The final norm, of a map `(B, C, h, w)` or, with a class token, of tokens `(B, 1 + h*w, C)`."""
        return self.norm(x) if self.class_token else self.norm_map(x)

    def norm_tokens(self, x: Tensor) -> Tensor:
        """The final norm, of tokens `(B, N, C)`."""
        return self.norm(x) if self.class_token else super().norm_tokens(x)

    def head_of_mean(self, prefix: Tensor, mean: Tensor, pre_logits: bool) -> Tensor:
        """`forward_head` of the class token and the mean of the others."""
        if self.class_token:
            return self.forward_head(torch.cat([prefix, mean], dim=1), pre_logits)
        return super().head_of_mean(prefix, mean, pre_logits)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, of the output of `forward_features`."""
        if self.class_token and self.global_pool not in ("token", ""):
            x = x[:, 1:].transpose(1, 2)[..., None]  # as a map of one column
        return super().forward_head(x, pre_logits)


_CFG = {"first_conv": "stages.0.downsample.proj", "classifier": "head.fc"}


def _hosts(size: str, depths: tuple[int, ...], published: dict[str, Any]) -> Iterator[Host]:
    """As published, and the host of InLine: twice the heads, no class token, no final norm."""
    for name, heads, more, known, stride in (
        (f"pvt_{size}", (1, 2, 5, 8), {}, published, 0),
        (f"pvt_{size}_meanpool", (2, 4, 10, 16), {"global_pool": "avg", "final_norm": "absent"}, {}, 32),
    ):
        stages = tuple(map(StageSize, (64, 128, 320, 512), depths, heads, (8, 8, 4, 4), (8, 4, 2, 1)))
        yield Host(name, PyramidVisionTransformer, {"stages": stages, **more}, _CFG, FOUR_MAPS, known, stride=stride)


# With softmax, as published.
add_hosts(
    *_hosts("tiny", (2, 2, 2, 2), figures(75.1, 13.23, 1.93)),
    *_hosts("small", (3, 4, 6, 3), figures(79.8, 24.49, 3.82)),
    *_hosts("medium", (3, 4, 18, 3), figures(81.2, 44.21, 6.66)),
    *_hosts("large", (3, 8, 27, 3), figures(81.7, 61.37, 9.81)),
)
