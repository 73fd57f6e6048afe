"""The places of tokens that come without a grid, and a refusal of arguments that ask for too much."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from linsight.attention import Core, require
from linsight.errors import LinsightError
from linsight.ops import Grid, as_layout, traced

GridLike: TypeAlias = tuple[int, ...] | Literal["1d"]  # height, width, and perhaps prefix tokens; or 1 x N


def table_grid(grid: GridLike | None) -> tuple[int, int] | None:
    """Height and width that position tables are made for, where they are known."""
    return None if grid is None or grid == "1d" else as_layout(grid).grid[:2]  # type: ignore[arg-type]


def locate(grid: GridLike, prefix: int, x: Tensor) -> Grid:
    """The grid of the tokens `x` `(B, N, C)`.

    Raises:
        LinsightError: N tokens do not fit it.
    """
    tokens = x.shape[1]
    if grid == "1d":
        return Grid(1, tokens - prefix, prefix)
    found = as_layout(grid).grid  # type: ignore[arg-type]
    found = found._replace(prefix=prefix or found.prefix)
    if not traced() and tokens != found.tokens:
        raise LinsightError(
            f"{tokens} tokens came, but a grid of {found.height}x{found.width} with {found.prefix} prefix tokens "
            f"has {found.tokens}: say how these lie with grid=(height, width) and prefix=, or set `grid` of the module"
        )
    return found


def check_prefix(owner: type[nn.Module], prefix: int) -> None:
    """Raise, naming who can, where a mechanism has no place for prefix tokens."""
    if prefix:
        require(owner, "prefix", "prefix tokens")


def lies_on_grid(core: Core) -> bool:
    """True where it matters to a mechanism where tokens lie: it convolves, pools, goes by order, or has no prefix."""
    local = core.ordered or core.halo or any(now.halo or now.of == "queries" for now in core.rounds)
    return bool(local) or not core.capabilities.prefix


def refuse(given: Mapping[str, Any], table: Mapping[str, str]) -> None:
    """Raise for the first argument in `table` that asks for something; None, False and 0 ask for nothing."""
    for name, way in table.items():
        if given.get(name):
            raise LinsightError(f"{name}={given[name]}: {way}")


def score_bias(mask: Tensor, dropped: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added to the scores, in the dtype of `like`: -inf where a boolean one has `dropped`."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(dropped, float("-inf"))
    return mask.to(like.dtype)
