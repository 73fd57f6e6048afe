"""Modules whose tokens lie over ranks: a layer, a block or a host on bands of rows."""

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from linsight.attention import Block, Layer
from linsight.errors import CapabilityError
from linsight.ops import Grid, LayoutLike, as_layout, check_tokens
from linsight.streaming import check_streams, reach

from ._bands import Band, Bands
from ._random import same_draws
from ._ranks import Ranks

M = TypeVar("M", bound=nn.Module)


def split(module: M, mesh: DeviceMesh) -> M:
    """Give `module` bands of rows from now on, of which each rank of `mesh` holds its own, the first the top.

    It is changed in place, as `fully_shard` does, and returned; parameters and their names stay. A layer or block
    takes `(x, layout)`, the tokens of the band and their grid: bands may differ in height. Prefix tokens are given
    to, and come from, every rank, and count once.

    Raises:
        CapabilityError: a mechanism in it has no states that merge; the message names those that have.
        LinsightError: it is split already, or the mesh has more than one dimension.
    """
    ranks = Ranks(mesh)
    if not isinstance(module, Layer | Block):
        raise CapabilityError(f"a {type(module).__name__} is no layer or block of linsight: split those in it")
    check_streams(module)
    module.__dict__["forward"] = _SplitLayer(module, ranks)
    return module


class _SplitLayer:
    """In the place of the `forward` of a layer or block."""

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.module, self.ranks = module, ranks
        self.bands = Bands(module, ranks)
        self.reach = reach(module)

    def __call__(self, x: Tensor, layout: LayoutLike, *, cond: Tensor | None = None, **more: Any) -> Tensor:
        layout, ranks = as_layout(layout), self.ranks
        if layout.sizes is not None or layout.is_packed or any(value is not None for value in more.values()):
            asked = [name for name, value in more.items() if value is not None] or ["sizes or packed images"]
            raise CapabilityError(f"split over ranks, a layer takes whole images and their tokens, no {asked[0]}")
        check_tokens(x, layout)
        height, width, prefix = layout.grid
        bounds = ranks.bounds(height, x, batch=x.shape[0], width=width, prefix=prefix, channels=x.shape[2])
        band = Band(Grid(bounds[-1], width, prefix), bounds, ranks.own, self.reach)
        beside = {} if cond is None else {"cond": cond}
        if ranks.own:  # prefix tokens go with the first row
            x, beside = x[:, prefix:], {name: t[:, prefix:] for name, t in beside.items()}
        with same_draws(self.module, ranks, x.device):
            out = self.bands.run(functools.partial(type(self.module).forward, self.module), x, band, **beside)
        if not prefix:
            return out
        # The others give what is not read, as whoever gathers has to be a part of the graph.
        mine = out[:, :1].expand(-1, prefix, -1) if ranks.own else out[:, :prefix]
        first = ranks.gather(mine)[0]
        return torch.cat([first, out if ranks.own else out[:, prefix:]], dim=1)
