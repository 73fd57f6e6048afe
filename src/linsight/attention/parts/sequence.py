"""Tokens as one sequence: the grid row by row, prefix tokens in front."""

import torch
from torch import Tensor

from linsight.ops import Tile


def places(tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """The place in the sequence of the tile's own tokens `(B or 1, n)`, and how long that is `(B or 1, 1)`.

    B where the batch is padded: each image has a sequence of its own, and the places of padding mean nothing.
    """
    rows = torch.arange(tile.height, device=device)[:, None] + tile.top
    columns = torch.arange(tile.width, device=device) + tile.left
    if tile.sizes is None:
        height, width = (torch.full((1, 1), side, dtype=torch.long, device=device) for side in tile.grid[:2])
    else:
        height, width = tile.sizes.to(device).split(1, dim=1)
    place = tile.grid.prefix + (rows * width[..., None] + columns).flatten(1)
    first = torch.arange(tile.prefix, device=device).expand(place.shape[0], -1)
    return torch.cat([first, place], dim=1), tile.grid.prefix + height * width
