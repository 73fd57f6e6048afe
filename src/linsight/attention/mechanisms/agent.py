"""Agent attention: a few pooled queries gather from all keys by softmax, and every query reads from them by softmax.

Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024 (arXiv 2312.08874),
by its published code. A are n = p^2 agents, the map of queries pooled to p x p (adaptive averages, so cells overlap
where p does not divide the grid). Per head, with s = d^(-1/2),

    o = softmax_agents(s q A^T + B2) softmax_keys(s A k^T + B1) v + conv3x3(v),

where the convolution is depthwise. The biases depend on places, not on images: with a grid h x w of keys,
B1[a, (y, x)] = up(an)[a, y, x] + ah[a, y] + aw[a, x], of which an is a block of 7x7 for each agent, brought to the
grid bilinearly; B2 alike, of na, ha and wa, on the grid of the queries. At another grid than that of the tables,
ah + aw is resampled bilinearly, as in the published backbones for dense tasks. That is each of them alone along its
own side, since weights of a row sum to 1; and as all of this is linear, agents on another grid than that of the
tables (`agent_grid`) may have theirs resampled first, where the tables are small, instead of last, as published.

Prefix tokens are keys and queries as all others, but in no agent, and the convolution does not touch them. A class
token was published with a bias (`prefix_bias`); several prefix tokens share it. Keys of a reduced grid, as in
PVT: their v is brought back to the grid of the queries bilinearly, for the convolution.
"""

import math
from typing import Any

import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Tile, read_pooled, separable, unflatten

from ..capabilities import Capabilities, Structure
from ..core import Core, Rename
from ..layer import Attention
from ..parts.bias_tables import AgentTables, stretches
from ..parts.pooled import Gather, Pool
from ..parts.token_conv import TokenConv, add_behind, convolved_values, grid_values
from ..registry import Paper, register
from ..rounds import Done
from ..tokens import Tokens, split_heads

_TABLES = ("an", "na", "ah", "aw", "ha", "wa", "ac", "ca")


class AgentGather(Gather):
    """Softmax over the keys, with the bias B1."""

    def bias(self, core: Any, tile: Tile) -> Tensor:
        """B1 of the tile's keys."""
        return core.tables(tile, "keys")


class AgentAttention(Attention):
    """The usual layer, which tells the tables both grids: with a reduction, that of the keys is another one."""

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the tables to the grid of `x`, and to the one that it is reduced to."""
        tables: AgentTables = self.core.tables  # type: ignore[assignment]
        tables.set_grids(self.reduction.grid(grid) if self.reduction is not None else grid, grid)


@register(
    "agent",
    formula="o = softmax(d^(-1/2) q A^T + B2) softmax(d^(-1/2) A k^T + B1) v + conv3x3(v), A = pool(q)",
    latex=r"o = \mathrm{softmax}_{\mathrm{agents}}(s q A^\top + B_2) \mathrm{softmax}_{\mathrm{keys}}(s A k^\top + "
    r"B_1) v + \mathrm{conv}_{3 \times 3}(v), \quad A = \mathrm{pool}(q), \quad s = d^{-1/2}",
    family="low rank",
    complexity="O(N n d)",
    paper=Paper("Agent Attention: On the Integration of Softmax and Linear Attention", "2312.08874", "ECCV 2024"),
)
class Agent(Core):
    """Softmax attention through pooled agents.

    Args:
        agents: n, a square number; of its biases, where `agent_grid` is another.
        agent_grid: height and width that queries are pooled to, where it is not a square of `agents`. Trained biases
            are resampled, so a model may use more agents on larger images, as the published dense backbones do.
        local: the depthwise convolution of v; of no use in a host that has its own (CSwin's LePE).
        prefix_bias: a bias for prefix tokens, as published for the class token.
    """

    capabilities = Capabilities(sizes=True, prefix=True)
    structure = Structure(stream=True, reduced=True)
    turns = "tokens"
    halo = 1
    layer = AgentAttention
    published = (
        *(Rename(f"{name}_bias", f"core.tables.{name}_bias") for name in _TABLES),
        Rename("dwc.", "core.dwc."),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agents: int = 49,
        agent_grid: tuple[int, int] | None = None,
        local: bool = True,
        prefix_bias: bool = False,
        grid: tuple[int, int] | None = None,
        query_grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        side = math.isqrt(max(agents, 0))
        if agents < 1 or side * side != agents:
            raise LinsightError(
                f"agents={agents} of 'agent' must be a square number, as 9 or 49; agent_grid= may be any grid"
            )
        self.agent_grid = (side, side) if agent_grid is None else (agent_grid[0], agent_grid[1])
        if min(self.agent_grid) < 1:
            raise LinsightError(f"agent_grid={agent_grid} of 'agent' must be a height and a width of 1 or more")
        self.num_heads = num_heads
        self.rounds = (Pool(self.agent_grid), AgentGather())
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tables = AgentTables(
            num_heads, agents, self.agent_grid, keys=grid, queries=query_grid or grid, prefix=prefix_bias, **factory
        )
        self.dwc = TokenConv(dim, **factory) if local else None

    def read(self, tokens: Tokens, tile: Tile, done: Done) -> Tensor:
        """The values that queries read from the agents, and the convolution of v."""
        agents, values = done
        out = read_pooled(tile.inner(tokens.q), agents, values, self.tables(tile, "queries"))
        if self.dwc is not None:
            out = add_behind(out, convolved_values(self.dwc, tokens, tile), tile.prefix)
        return out.to(tokens.v.dtype)

    def lift(self, tokens: Tokens, keys: Tile, queries: Tile) -> Tokens:
        """v brought to the grid of the queries bilinearly."""
        v = grid_values(tokens, keys)
        old = (keys.grid.height, keys.grid.width)
        rows, columns = stretches(v, old, queries)
        v = separable(unflatten(v, 1, old), rows[0, 0], columns[0, 0]).flatten(1, 2)
        return tokens._replace(v=split_heads(v, self.num_heads))

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the tables to another grid, of keys and queries."""
        self.tables.set_grids(grid, grid)
