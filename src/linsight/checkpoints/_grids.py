"""The grids that the tables of a checkpoint lie on, as the file, the caller or the publication tells, never a guess."""

import copy
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn

from linsight.errors import CheckpointError, LinsightError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS, default_config, fit_bias_table
from linsight.models.seams import set_grid
from linsight.ops import FittedTable

from .unwrap import unwrapped_key

Sides = tuple[int, int]


class Made(NamedTuple):
    """The model that a file was made by, as far as it is known.

    tables: the grid of each table, by its key in the file.  size: height and width of its images.
    asked: the same, and `grid` that of its first stage, as the caller says it; they come before the file's own.
    """

    tables: Mapping[str, Sides] = MappingProxyType({})
    size: Sides | None = None
    asked: Sides | None = None
    grid: Sides | None = None


class Grids:
    """The grids of the tables of `model`, and of those in a file."""

    def __init__(self, model: nn.Module, made: Made) -> None:
        self.model, self.made = model, made
        self._own = _grids(model)
        self._at: dict[tuple[str, Sides], tuple[nn.Module, dict[str, Sides]]] = {}

    def own(self, key: str) -> Sides | None:
        """The grid or the window that the table `key` of the model lies on; None for all else."""
        return self._own.get(key)

    def old(self, key: str, source: str, table: Tensor) -> Sides | None:
        """The grid of `table` of the file, there called `source`, here `key`; None where nothing tells it."""
        made = self.made
        if made.grid is not None:
            return self._moved(key, made.grid, "grid")
        if made.asked is not None:
            return self._moved(key, made.asked, "size")
        if source in made.tables:
            return made.tables[source]
        if made.size is not None:
            return self._moved(key, made.size, "size")
        return self.published(key, table)

    def published(self, key: str, table: Tensor) -> Sides | None:
        """The square grid of `table` that is the model's own, or else that of a published size of images.

        A table with as many rows as an oblong one of the model may be any: None. A layer alone is made for its grid.
        """
        own = self.own(key)
        if own is None or self.fit(key, table, own) is not None:
            alone = not hasattr(self.model, "set_input_size")
            return own if own and (alone or own[0] == own[1]) else None
        for size in sorted(_published_sizes(self.model)):
            old = self._moved(key, size, "size")
            if old is not None and self.fit(key, table, old) is not None:
                return old
        return None

    def fit(self, key: str, table: Tensor, old: Sides | None) -> FittedTable | None:
        """`table`, of the grid `old`, as the innermost module on `key` that knows it resamples it to its own."""
        for owner, name in _owners(self.model, key):
            fit = getattr(owner, "fit_table", None)
            if fit is not None:
                fitted = fit(name, table) if old is None else fit(name, table, old)
            else:
                fitted = None if old is None else _fit_of_timm(owner, name, table, old)
            if fitted is not None:
                return fitted
        return None

    def _moved(self, key: str, sides: Sides, kind: str) -> Sides | None:
        """The grid that the table would lie on, or its window in, in a model of these images or this first grid."""
        if (kind, sides) not in self._at:
            moved = _without_values(self.model)
            (_to_grid if kind == "grid" else _to_size)(moved, sides)
            self._at[kind, sides] = moved, _grids(moved)
        moved, grids = self._at[kind, sides]
        block: Any = moved.get_submodule(key.rpartition(".")[0].rpartition(".")[0])
        if key.endswith("relative_position_bias_table") and hasattr(block, "input_resolution"):
            return self.own(key) if getattr(block, "dense", False) else _pair(block.input_resolution)
        return grids.get(key)


def _owners(model: nn.Module, key: str) -> Iterator[tuple[Any, str]]:
    """The modules on `key`, the innermost first, with what is left of it."""
    path = key.split(".")
    for depth in range(len(path) - 1, -1, -1):
        yield model.get_submodule(".".join(path[:depth])), ".".join(path[depth:])


def _grids(model: nn.Module) -> dict[str, Sides]:
    """The grid of each table of `model`, by its key, as the innermost module that has it tells."""
    found: dict[str, Sides] = {}
    for path, owner in model.named_modules(remove_duplicate=False):  # the outer ones first
        tables: Any = owner.table_grids() if hasattr(owner, "table_grids") else _grids_of_timm(owner)
        prefix = unwrapped_key(f"{path}.") if path else ""
        found |= {f"{prefix}{name}": sides for name, sides in tables.items()}
    return found


def _grids_of_timm(owner: Any) -> dict[str, Sides]:
    """The tables of a module of timm, as `table_grids` tells those of ours."""
    found: dict[str, Sides] = {}
    bias, places = getattr(owner, "relative_position_bias_table", None), getattr(owner, "pos_embed", None)
    if isinstance(bias, Tensor) and bias.ndim == 2 and hasattr(owner, "window_size"):
        found["relative_position_bias_table"] = _pair(owner.window_size)
    grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)
    if isinstance(places, Tensor) and places.ndim == 3 and grid:
        found["pos_embed"] = _pair(grid)
    return found


def _fit_of_timm(owner: Any, name: str, table: Tensor, old: Sides) -> FittedTable | None:
    """A table of the grid `old` for timm's class or our ViT, which resample as timm does."""
    new = _grids_of_timm(owner).get(name)
    if new is None or name != "pos_embed":
        return fit_bias_table(table, new, old) if new else None
    prefix = owner.pos_embed.shape[1] - math.prod(new)  # which has no place on the grid
    if table.ndim != 3 or table.shape[1] < math.prod(old):
        return None
    if not prefix and table.shape[1] == math.prod(old) + 1:
        table = table[:, 1:]  # the row of a class token, for a model without one
    if table.shape[1] != math.prod(old) + prefix:
        return None
    return FittedTable(resample_abs_pos_embed(table, list(new), list(old), prefix), old, new)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of `model` whose tensors have no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _to_size(model: Any, size: Sides) -> None:
    """Move a copy to images of `size`."""
    if not hasattr(model, "set_input_size"):
        raise CheckpointError(
            f"'{type(model).__name__}' has no size of images: pass from_grid=(height, width), in tokens"
        )
    try:
        model.set_input_size(size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"no model of images of {size[0]}x{size[1]}: {str(error).splitlines()[0]}") from error


def _to_grid(model: Any, grid: Sides) -> None:
    """Move a copy to the grid of its first tokens."""
    if hasattr(model, "set_input_size"):
        (down, right), rim = _stride(model), 2 * getattr(getattr(model, "patch_embed", None), "border", 0)
        _to_size(model, ((grid[0] - rim) * down, (grid[1] - rim) * right))
    elif hasattr(model, "set_grid"):
        model.set_grid(grid)
    else:
        set_grid(model, grid)


def _stride(model: Any) -> Sides:
    """Height and width of the pixels of a token of the first grid."""
    embed = getattr(model, "patch_embed", None)
    return _pair(embed.patch_size if isinstance(embed, PatchEmbed) else int(model.feature_info[0]["reduction"]))


def _pair(sides: Any) -> Sides:
    return (sides, sides) if isinstance(sides, int) else (int(sides[0]), int(sides[1]))


def _published_sizes(model: Any) -> set[Sides]:
    """The sizes of images, all square, that models of this class were published for."""
    found = set[Sides]()
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not hasattr(model, "set_input_size"):
        return found
    for name in (*VARIANTS, *HOSTS, *ARCHITECTURES):
        variant = VARIANTS.get(name)
        cls: Any = (HOSTS[variant.host] if variant else HOSTS.get(name) or ARCHITECTURES[name]).model_cls
        if isinstance(model, cls) or issubclass(cls, type(model)):
            found.add(_pair(default_config(name)["input_size"][-2:]))
    if cfg.get("input_size"):
        found.add(_pair(cfg["input_size"][-2:]))
    return {size for size in found if size[0] == size[1]}


def check_sides(name: str, sides: Any) -> Sides | None:
    """`sides`, one or two whole numbers above 0, as height and width; raises otherwise."""
    if sides is None:
        return None
    numbers = [sides, sides] if isinstance(sides, int) else list(sides) if isinstance(sides, list | tuple) else []
    if len(numbers) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
        raise LinsightError(f"{name}={sides!r} must be a height and a width, whole numbers above 0")
    return numbers[0], numbers[1]
