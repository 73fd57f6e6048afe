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
from torch import Tensor, nn

from linsight.errors import LinsightError
from linsight.ops import (
    Grid,
    Layout,
    State,
    Tile,
    gather_pooled,
    gather_state,
    pool_tokens,
    read_pooled,
    separable,
)

from ..core import Capabilities, Core, Rename, Tokens
from ..layer import Attention
from ..parts.bias_tables import AgentTables, stretches
from ..parts.token_conv import add_local, grid_values
from ..registry import Paper, register

_TABLES = ("an", "na", "ah", "aw", "ha", "wa", "ac", "ca")


class AgentAttention(Attention):
    """The usual layer, which tells the tables both grids: with a reduction, that of the keys is another one."""

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the tables to the grid of `x`, and to the one that it is reduced to."""
        tables: AgentTables = self.core.tables  # type: ignore[assignment]
        tables.set_grids(self.reduction.grid(grid) if self.reduction is not None else grid, grid)


@register(
    "agent",
    formula="o = softmax(d^(-1/2) q A^T + B2) softmax(d^(-1/2) A k^T + B1) v + conv3x3(v), A = pool(q)",
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

    capabilities = Capabilities(sizes=True, reduced=True, stream=True, prefix=True)
    rounds = 2
    halos = (0, 0, 1)
    of_queries = (0,)
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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tables = AgentTables(
            num_heads, agents, self.agent_grid, keys=grid, queries=query_grid or grid, prefix=prefix_bias, **factory
        )
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory) if local else None

    def absorb(self, r: int, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> State:
        """The tile's share of the agents `(B, n, H, D)`; then what they gather from its keys."""
        if r == 0:
            return pool_tokens(tokens.q, tile, self.agent_grid)
        return gather_state(done[0], tokens.k, tokens.v, self.tables.of_keys(tile), tokens.keep)

    def finish(self, r: int, state: State, grid: Grid) -> Tensor:
        """The agents, then their values `(B, H, n, E)`."""
        return state if r == 0 else state.mean()

    def read(self, tokens: Tokens, tile: Tile, done: tuple[State, ...]) -> Tensor:
        """What queries read from the agents, and the convolution of v."""
        agents, values = done
        out = read_pooled(tile.inner(tokens.q), agents, values, self.tables.of_queries(tile))
        if self.dwc is not None:
            out = add_local(out, grid_values(tokens, tile), self.dwc, tile)
        return out.to(tokens.q.dtype)

    def forward(
        self,
        tokens: Tokens,
        layout: Layout,
        *,
        context_layout: Layout | None = None,
        score_bias: Tensor | None = None,
    ) -> Tensor:
        """The rounds over the whole, as two calls of scaled dot-product attention."""
        source = context_layout or layout
        queries, keys = Tile.whole(layout.grid, layout.sizes), Tile.whole(source.grid, source.sizes)
        of_keys, of_queries = self.tables(keys, queries)
        agents = pool_tokens(tokens.q, queries, self.agent_grid)
        values = gather_pooled(agents, tokens.k, tokens.v, of_keys, tokens.keep)
        out = read_pooled(tokens.q, agents, values, of_queries)
        if self.dwc is not None:
            v = grid_values(tokens, keys)
            if context_layout is not None:
                v = v.to(out.dtype)
                rows, columns = stretches(v, (keys.grid.height, keys.grid.width), queries)
                v = separable(v.unflatten(1, (keys.grid.height, keys.grid.width)), rows[0, 0], columns[0, 0]).flatten(
                    1, 2
                )
            out = add_local(out, v, self.dwc, queries)
        return out.to(tokens.q.dtype)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the tables to another grid, of keys and queries."""
        self.tables.set_grids(grid, grid)
