"""The attention over a slide, as numbers and as a picture."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .bag import Bag

# From little to much.
_RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float32)


def attention_map(bag: Bag, weights: Tensor) -> Tensor:
    """The weights `(N,)` of tiles on the grid of all tiles, `(rows, columns)` float32: NaN where no tile was kept."""
    found = torch.full(bag.grid, torch.nan)
    found[bag.places[:, 0], bag.places[:, 1]] = weights.to(found)
    return found


def attention_picture(bag: Bag, weights: Tensor, *, strength: float = 0.6) -> Image.Image:
    """The slide, small, with the tiles that were kept in colours from violet to yellow, by the rank of their weights.

    Ranks, as weights of a few tiles may be larger than all others by orders of magnitude; equal weights have the colour
    of their mean rank.

    strength: how opaque colours are, 0 to 1.
    """
    _, inverse, counts = weights.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    middle = (ends - (counts - 1) / 2 - 1) / max(len(weights) - 1, 1)
    shares = attention_map(bag, middle[inverse]).numpy()
    place = np.nan_to_num(shares, nan=0.0) * (len(_RAMP) - 1)
    low = np.minimum(place.astype(np.int64), len(_RAMP) - 2)
    over = (place - low)[..., None]
    colours = _RAMP[low] * (1 - over) + _RAMP[low + 1] * over
    opacity = np.where(np.isnan(shares), 0.0, strength)[..., None]
    side = bag.picture.shape[1] // bag.grid[0]
    colours, opacity = (np.repeat(np.repeat(x, side, 0), side, 1) for x in (colours, opacity))
    pixels = bag.picture.movedim(0, -1).numpy()
    return Image.fromarray(np.rint(pixels * (1 - opacity) + colours * opacity).astype(np.uint8))
