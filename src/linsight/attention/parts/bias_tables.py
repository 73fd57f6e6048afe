"""The biases of agent attention: tables on a grid, brought to any other one."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.ops import FittedTable, Tile, accumulator, full_precision, resize_matrix, separable, unflatten

_BLOCK = 7  # side of `an` and `na`, whatever the grid
_AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}  # of each table along a side of a grid


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

    def forward(self, tile: Tile, side: Literal["keys", "queries"]) -> Tensor:
        """B1 of the keys of `tile` `(1 or B, H, n, N)`, or B2 of its queries `(1 or B, H, M, n)`, without its halo.

        In the accumulator's dtype.
        """
        if side == "keys":
            sides = None
            if self.ah_bias is not None and self.aw_bias is not None:
                sides = self.ah_bias[0, ..., 0], self.aw_bias[0, :, :, 0]
            return self._lay(tile, self.an_bias, sides, None if self.ac_bias is None else self.ac_bias[0])
        sides = None
        if self.ha_bias is not None and self.wa_bias is not None:
            sides = self.ha_bias[0, :, :, 0].transpose(-1, -2), self.wa_bias[0, :, 0].transpose(-1, -2)
        first = None if self.ca_bias is None else self.ca_bias[0].transpose(-1, -2)
        return self._lay(tile, self.na_bias, sides, first).transpose(-1, -2).contiguous()

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
            bias = rows[:, None] @ (block @ columns[:, None].transpose(-1, -2))
            if sides is not None:
                down, across = (self._of_agents(side) for side in sides)
                rows, columns = stretches(block, (down.shape[-1], across.shape[-1]), tile)
                bias = (
                    bias
                    + (down @ rows.transpose(-1, -2))[..., None]
                    + (across @ columns.transpose(-1, -2))[..., None, :]
                )
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
        canvas = unflatten(table.flatten(2), 1, (self.side, self.side))
        return unflatten(separable(canvas, rows, columns).flatten(1, 2), 2, table.shape[2:])


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
