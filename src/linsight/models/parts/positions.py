"""Position tables that are added to a map's tokens, at any grid."""

import torch
from torch import Tensor

from linsight.ops import Mode, Tile, table_for


@torch.fx.wrap  # one node of its graphs: what is read of a table depends on sizes
def _placed(x: Tensor, table: Tensor, size: tuple[int, int], tile: Tile, mode: Mode) -> Tensor:
    return x + table_for(table, size, tile, mode).to(x.dtype)


def with_positions(x: Tensor, table: Tensor, size: tuple[int, int], tile: Tile, mode: Mode) -> Tensor:
    """Tokens `x` `(B, n, C)` of `tile`, without prefix, plus the table `(1, h*w, C)` of a grid of `size`.

    Resampled by matrices (`linsight.ops.table_for`): sizes may be unknown, and gradients go through a compiled graph.
    """
    return _placed(x, table, size, tile, mode)
