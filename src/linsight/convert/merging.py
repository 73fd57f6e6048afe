"""Token merging, and agent attention on merged tokens, as plain functions: nothing here has parameters.

One token of each cell of the grid is a *destination*, all others are *sources*. A source's likeness to a destination is
their cosine, and its own destination is the one that it is most like. The R sources that are most like theirs are
merged into them; agents are the same tokens with more sources merged, R_a:

    merge(y, R) = [the other sources; each destination's mean of itself and what is merged into it], N - R tokens
    a = merge(y, R_a), n = N - R_a tokens
    O = softmax(s^k2 Q A^T) softmax(s A K^T) V + ks V,  s = d^(-1/2), A = W_q a

Daniel Bolya and Judy Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023, arXiv 2303.17604; agents:
Dongchen Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874,
appendix on Stable Diffusion (AgentSD).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linsight.ops import accumulator, take_tokens

ROWS = 4096  # sources whose likenesses are there at once

Size = tuple[int, int]  # height and width


class Match(NamedTuple):
    """Sources in the order in which they are merged, each with its destination.

    destinations: `(M,)` their tokens, ascending.
    sources: `(B, S)` their tokens, the one most like its destination first.
    targets: `(B, S)` for each source, the number of its destination, 0 to M - 1.
    """

    destinations: Tensor
    sources: Tensor
    targets: Tensor


def count_cells(grid: Size, cell: Size) -> Size:
    """Rows and columns of whole cells; what is left over at the bottom and at the right lies in none."""
    return grid[0] // cell[0], grid[1] // cell[1]


def count_merged(grid: Size, cell: Size, ratio: float, agents: float = 0.0) -> tuple[int, int | None]:
    """R and R_a, the sources merged for the tokens and for the agents; None where agents would not pay.

    R = min(S, floor(ratio N)) of S sources among N tokens, R_a alike. Agents pay where they are less than half as many
    as the tokens that are left, 2 (N - R_a) < N - R. With no whole cell in the grid nothing is merged.

    Args:
        ratio, agents: shares of the tokens, 0 to 1.
    """
    tokens = grid[0] * grid[1]
    rows, columns = count_cells(grid, cell)
    sources = tokens - rows * columns if rows * columns else 0
    merged, pooled = (min(sources, int(tokens * share)) for share in (ratio, agents))
    return merged, pooled if 2 * (tokens - pooled) < tokens - merged else None


@torch.no_grad()
def match_tokens(x: Tensor, grid: Size, cell: Size = (2, 2), places: Tensor | None = None) -> Match:
    """Choose destinations, and find the nearest one of each source, without gradients.

    O(S M C); a token of zeros is like nothing, with a likeness of 0 to all.

    Args:
        x: `(B, N, C)` tokens in raster order.
        grid: their height and width, of which at least one cell is inside.
        places: `(rows, columns)` of cells: which token of each cell is its destination, in raster order from 0; the
            top left one, if None. It is the same for the whole batch.
    """
    rows, columns = count_cells(grid, cell)
    tokens = torch.arange(grid[0] * grid[1], device=x.device)
    cells = tokens.view(grid)[: rows * cell[0], : columns * cell[1]]
    cells = cells.unflatten(1, (columns, cell[1])).unflatten(0, (rows, cell[0])).transpose(1, 2).flatten(2)
    chosen = cells[..., 0] if places is None else cells.take_along_dim(places.to(x.device)[..., None], 2)
    taken = torch.zeros_like(tokens).index_fill(0, chosen.flatten(), 1)
    order = taken.argsort(stable=True)  # sources, then destinations, each in raster order
    sources, destinations = order[: len(order) - rows * columns], order[len(order) - rows * columns :]

    unit = F.normalize(_widened(x), dim=-1).to(x.dtype)
    nearest = unit.index_select(1, destinations).mT  # (B, C, M)
    found = [(part @ nearest).max(dim=-1) for part in unit.index_select(1, sources).split(ROWS, dim=1)]
    likeness = torch.cat([best.values for best in found], dim=1)  # (B, S)
    targets = torch.cat([best.indices for best in found], dim=1)
    ranked = likeness.argsort(dim=1, descending=True, stable=True)
    return Match(destinations, sources[ranked], targets.gather(1, ranked))


def merge_sources(y: Tensor, match: Match, count: int) -> Tensor:
    """Merge the first `count` sources of `y` `(B, N, C)`: `(B, N - count, C)`, kept sources and then destinations.

    Means are made in float32 at least.
    """
    into = _widened(y.index_select(1, match.destinations))  # (B, M, C)
    batch, number, width = into.shape
    merged, kept = (take_tokens(y, part) for part in _split(match.sources, count))
    rows = match.targets[:, :count] + number * torch.arange(batch, device=y.device)[:, None]
    total = into.flatten(0, 1).index_add(0, rows.flatten(), _widened(merged).flatten(0, 1))
    size = total.new_ones(batch * number).index_add(0, rows.flatten(), total.new_ones(batch * count))
    means = (total / size[:, None]).view(batch, number, width)
    return torch.cat([kept, means.to(y.dtype)], dim=1)


def unmerge_sources(out: Tensor, match: Match, count: int) -> Tensor:
    """Put the outputs of `merge_sources(y, match, count)` back, `(B, N - count, C)` to `(B, N, C)`.

    Each merged source receives a copy of its destination's output.
    """
    batch, number = match.sources.shape
    kept, destinations = number - count, len(match.destinations)
    own = torch.arange(out.shape[1], device=out.device).expand(batch, -1)  # the place of each output
    places = torch.cat([kept + match.targets[:, :count], own], dim=1)  # of merged, kept, destinations
    tokens = torch.cat([match.sources, match.destinations.expand(batch, destinations)], dim=1)
    return take_tokens(out, torch.empty_like(places).scatter(1, tokens, places))


def _widened(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


def _split(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return x[:, :count], x[:, count:]


def agent_attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, sharpness: float = 0.3, shortcut: float = 0.075
) -> Tensor:
    """Attention by way of agents, O(N n d): softmax(s^k2 Q A^T) softmax(s A K^T) V + ks V.

    With half as many agents as tokens, or more, it is softmax attention.

    Args:
        q, k, v: `(B, H, N, d)`, of the same tokens.
        agents: `(B, H, n, d)`, agent tokens by the projection of the queries.
        sharpness: k2; s^k2 is much sharper than s.
        shortcut: ks.
    """
    if 2 * agents.shape[2] >= q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v)
    scale = q.shape[3] ** -0.5
    gathered = F.scaled_dot_product_attention(agents, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, agents, gathered, scale=scale**sharpness) + shortcut * v
