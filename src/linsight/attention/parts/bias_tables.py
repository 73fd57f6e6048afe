"""The biases of agent attention: tables on a grid, brought to any other one, and kept where nothing can change."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import FittedTable, Grid, Tile, accumulator, full_precision, resize_matrix, separable

_BLOCK = 7  # side of `an` and `na`, whatever the grid
_MOST_KEPT = 2**20  # numbers a layer: those of all published classifiers, but not of a detector's large images
_AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}  # of each table along a side of a grid


class _Kept(NamedTuple):
    """Biases of the last call, and the parameters they were made of, with their versions.

    The parameters are held, detached, so that no other tensor can come to lie at their address.
    """

    place: tuple[Grid, Grid]
    made_of: tuple[tuple[Tensor, int], ...]
    biases: tuple[Tensor, Tensor]

    def holds(self, place: tuple[Grid, Grid], parameters: tuple[Tensor, ...]) -> bool:
        """Whether neither the grids nor any parameter has changed since."""
        return self.place == place and all(
            (old.data_ptr(), old.dtype, old.device, version) == (new.data_ptr(), new.dtype, new.device, new._version)
            for (old, version), new in zip(self.made_of, parameters, strict=True)
        )


class AgentTables(nn.Module):
    """The biases B1 and B2 of `agents` agents, a square number, resampled to `agent_grid` of them.

    Args:
        keys, queries: the grids that the tables are made for; with None there are only the blocks of 7x7.
        prefix: whether prefix tokens have a bias, too.
    """

    an_bias: nn.Parameter
    na_bias: nn.Parameter
    ah_bias: nn.Parameter | None
    aw_bias: nn.Parameter | None
    ha_bias: nn.Parameter | None
    wa_bias: nn.Parameter | None
    ac_bias: nn.Parameter | None
    ca_bias: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        agents: int,
        agent_grid: tuple[int, int],
        *,
        keys: tuple[int, int] | None,
        queries: tuple[int, int] | None,
        prefix: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.side, self.agent_grid = math.isqrt(agents), agent_grid
        height, width = keys or (0, 0)
        high, wide = queries or (0, 0)
        first = int(prefix)
        shapes = {
            "an_bias": (num_heads, agents, _BLOCK, _BLOCK),
            "na_bias": (num_heads, agents, _BLOCK, _BLOCK),
            "ah_bias": (1, num_heads, agents, height, 1),
            "aw_bias": (1, num_heads, agents, 1, width),
            "ha_bias": (1, num_heads, high, 1, agents),
            "wa_bias": (1, num_heads, 1, wide, agents),
            "ac_bias": (1, num_heads, agents, first),
            "ca_bias": (1, num_heads, first, agents),
        }
        for name, shape in shapes.items():
            table = None if 0 in shape else nn.Parameter(torch.empty(shape, **factory))
            self.register_parameter(name, table)
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        self._kept: _Kept | None = None

    def forward(self, keys: Tile, queries: Tile) -> tuple[Tensor, Tensor]:
        """B1 `(1 or B, H, n, N)` and B2 `(1 or B, H, M, n)` of whole grids, in the accumulator's dtype.

        Without gradients, and outside of compiled graphs, they are kept for the next call unless they are large.
        """
        if torch.compiler.is_compiling():
            return self.of_keys(keys), self.of_queries(queries)
        parameters, place = tuple(self.parameters()), (keys.grid, queries.grid)
        # Tensors of functorch, FSDP or fake modes are no plain parameters; those of inference mode count no versions.
        # A replica of DataParallel has no parameters at all.
        plain = bool(parameters) and all(type(p) is nn.Parameter and not p.is_inference() for p in parameters)
        if torch.is_grad_enabled() or keys.sizes is not None or not plain:
            # A step of training follows, which an optimiser may make through `.data`: that counts no version either.
            self._kept = None
            return self.of_keys(keys), self.of_queries(queries)
        kept = self._kept  # read once: another thread may put its own there
        if kept is None or not kept.holds(place, parameters):
            made_of = tuple((p.detach(), p._version) for p in parameters)
            kept = _Kept(place, made_of, (self.of_keys(keys), self.of_queries(queries)))
            self._kept = kept if sum(bias.numel() for bias in kept.biases) <= _MOST_KEPT else None
        return kept.biases

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def of_keys(self, tile: Tile) -> Tensor:
        """B1 of the keys of `tile`: `(1 or B, H, n, N)`."""
        first = None if self.ac_bias is None else self.ac_bias[0]
        if self.ah_bias is None or self.aw_bias is None:
            return self._lay(tile, self.an_bias, None, first)
        return self._lay(tile, self.an_bias, (self.ah_bias[0, ..., 0], self.aw_bias[0, :, :, 0]), first)

    def of_queries(self, tile: Tile) -> Tensor:
        """B2 of the queries of `tile`: `(1 or B, H, M, n)`."""
        first = None if self.ca_bias is None else self.ca_bias[0].mT
        sides = None
        if self.ha_bias is not None and self.wa_bias is not None:
            sides = self.ha_bias[0, :, :, 0].mT, self.wa_bias[0, :, 0].mT
        return self._lay(tile, self.na_bias, sides, first).mT.contiguous()

    def set_grids(self, keys: tuple[int, int], queries: tuple[int, int]) -> None:
        """Resample the tables, if there are any, to other grids, each along its own side."""
        for (name, axis), length in zip(_AXES.items(), (*keys, *queries), strict=True):
            old: nn.Parameter | None = getattr(self, name)
            if old is not None and old.shape[axis] != length:
                setattr(self, name, nn.Parameter(_stretched(old.detach(), axis, length), old.requires_grad))

    def fit_table(self, name: str, table: Tensor) -> FittedTable | None:
        """A published table of another grid, resampled to ours along its own side."""
        own: Tensor | None = getattr(self, name, None)
        if name not in _AXES or own is None or table.ndim != own.ndim:
            return None
        axis, grid = _AXES[name], slice(3, 5) if name.startswith("a") else slice(2, 4)
        fitted = _stretched(table, axis, own.shape[axis])
        return FittedTable(fitted, tuple(table.shape[grid]), tuple(own.shape[grid]))  # type: ignore[arg-type]

    def _lay(self, tile: Tile, block: Tensor, sides: tuple[Tensor, Tensor] | None, first: Tensor | None) -> Tensor:
        """`(1 or B, H, n, P + h*w)`, of tables `(H, agents, ...)`: 7x7, height and width, one for prefix tokens."""
        with full_precision(block):
            block = self._of_agents(block)
            rows, columns = stretches(block, (_BLOCK, _BLOCK), tile)
            bias = rows[:, None] @ (block @ columns[:, None].mT)
            if sides is not None:
                down, across = (self._of_agents(side) for side in sides)
                rows, columns = stretches(block, (down.shape[-1], across.shape[-1]), tile)
                bias = bias + (down @ rows.mT)[..., None] + (across @ columns.mT)[..., None, :]
            bias = bias.flatten(-2)
            if first is None:
                return F.pad(bias, (tile.prefix, 0)) if tile.prefix else bias
            return torch.cat([self._of_agents(first).expand(*bias.shape[:-1], tile.prefix), bias], dim=-1)

    def _of_agents(self, table: Tensor) -> Tensor:
        """`table` `(H, agents, ...)`, resampled to the agents there are: `(H, n, ...)`, in the accumulator's dtype."""
        table = table.to(accumulator(table.dtype))
        if self.agent_grid == (self.side, self.side):
            return table
        rows, columns = (
            resize_matrix(self.side, new, "bilinear", device=table.device, dtype=table.dtype) for new in self.agent_grid
        )
        canvas = table.flatten(2).unflatten(1, (self.side, self.side))
        return separable(canvas, rows, columns).flatten(1, 2).unflatten(2, table.shape[2:])


def stretches(like: Tensor, old: tuple[int, int], tile: Tile) -> list[Tensor]:
    """Matrices `(1 or B, 1, places, old)` for the rows and the columns of `tile`, without halo."""
    sides: tuple[Any, ...] = tile.grid[:2] if tile.sizes is None else tile.sizes.to(like.device).unbind(1)
    places = ((tile.top, tile.height), (tile.left, tile.width))
    made = (
        resize_matrix(length, side, "bilinear", start=start, count=count, device=like.device, dtype=like.dtype)
        for length, side, (start, count) in zip(old, sides, places, strict=True)
    )
    return [matrix[None, None] if tile.sizes is None else matrix[:, None] for matrix in made]


def _stretched(table: Tensor, axis: int, length: int) -> Tensor:
    """`table` resampled linearly along one axis."""
    dtype = accumulator(table.dtype)
    matrix = resize_matrix(table.shape[axis], length, "bilinear", device=table.device, dtype=dtype)
    return torch.tensordot(table.to(dtype), matrix, dims=([axis], [1])).movedim(-1, axis).to(table.dtype)
