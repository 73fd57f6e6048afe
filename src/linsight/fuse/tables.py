"""Biases that are kept for a grid, and rotations as complex products."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linsight.attention.mechanisms.mlla import MLLA
from linsight.attention.parts.bias_tables import AgentTables
from linsight.ops import Tile, Turn

from .form import form_of

_MOST_KEPT = 2**20  # numbers a table: those of all published classifiers, but not of a detector's large images
_MOST_GRIDS = 4  # for which they are kept


class KeptTables(AgentTables):
    """The biases of agent attention, kept for the grids they were last made for."""

    kept: dict[Any, Tensor]

    def forward(self, tile: Tile, side: Literal["keys", "queries"]) -> Tensor:
        """The bias of a tile; see `AgentTables.forward`."""
        if torch.compiler.is_compiling() or not tile.is_whole or tile.sizes is not None:
            return super().forward(tile, side)
        like = self.an_bias
        place = (side, tile.grid, like.device, like.dtype)
        found = self.kept.get(place)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # to be kept for calls outside of it, too
                found = super().forward(tile, side)
            if found.numel() <= _MOST_KEPT:
                while len(self.kept) >= 2 * _MOST_GRIDS:
                    self.kept.pop(next(iter(self.kept)))
                self.kept[place] = found
        return found


class ComplexTurn(Turn):
    """A rotation as one product of complex numbers: one pass over memory."""

    def turned(self, x: Tensor) -> Tensor:
        """Grid tokens `(B, h*w, C)`, turned."""
        if self.heads > 1 or x.requires_grad or x.is_meta or torch.compiler.is_compiling():
            return super().turned(x)
        height, _ = self.size
        pairs = torch.view_as_complex(x.contiguous().unflatten(1, self.size).unflatten(-1, (2, -1, 2)))
        turns, out = torch.complex(self.cos, self.sin), torch.empty_like(pairs)  # (B, h, w, 2, C / 4)
        torch.mul(pairs[..., 0, :], turns[:height, None], out=out[..., 0, :])
        torch.mul(pairs[..., 1, :], turns[height:], out=out[..., 1, :])
        return torch.view_as_real(out).flatten(1, 2).flatten(2)


TABLE_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    AgentTables: lambda tables: form_of(tables, KeptTables, kept={}),
    MLLA: lambda core: form_of(core, MLLA, turn=ComplexTurn),
}
