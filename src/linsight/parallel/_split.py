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
from ._host import SplitHost
from ._random import same_draws
from ._ranks import Ranks

M = TypeVar("M", bound=nn.Module)


def split(module: M, mesh: DeviceMesh) -> M:
    """Give `module` bands of rows from now on, of which each rank of `mesh` holds its own, the first the top.

    It is changed in place, as `fully_shard` does, and returned; parameters and their names stay. All ranks must make
    the same calls, backward passes included. Bands may differ in height.

    Args:
        module: a host that streams, whose calls are then `model(band, output="logits")`: rows `(B, C, h, W)` of images
            to logits or "features", equal on all ranks, or the rank's rows of the last "map" `(B, h', w', C)`.
            Or a layer or block, called as `layer(x, layout)` with the tokens of the band and their grid; its prefix
            tokens are given to, and come from, every rank, and count once.
        mesh: of one dimension, as `mesh["rows"]`.

    Gradients are exact, and those of the ranks add up to that of the sum of their losses. So where all ranks have
    the same loss, of logits, their mean is its gradient: what DDP and FSDP make over all ranks.

    Raises:
        CapabilityError: a mechanism in it has no states that merge; the message names those that have.
        LinsightError: it is split already, or the mesh has more than one dimension.
    """
    ranks = Ranks(mesh)
    if isinstance(module, Layer | Block):
        check_streams(module)
        module.__dict__["forward"] = _SplitLayer(module, ranks)
    else:
        module.__dict__["forward"] = SplitHost(module, ranks)
    return module


def shard_image(image: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of `image` `(..., H, W)` for this rank of `mesh`, a view: as even as can be.

    Raises:
        LinsightError: it has fewer rows than there are ranks.
    """
    ranks = Ranks(mesh)
    first, end = ranks.shares(image.shape[-2])[ranks.own :][:2]
    return image[..., first:end, :]


def gather(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """The whole of what lies in bands over the ranks along `dim`, as a "map" does along 1; on every rank."""
    ranks, dim = Ranks(mesh), dim % x.ndim
    others = {f"axis {i}": side for i, side in enumerate(x.shape) if i != dim}
    bounds = ranks.bounds(x.shape[dim], x, **others)
    return ranks.exchange(x, dim, bounds, [(0, bounds[-1])] * ranks.count)


class _SplitLayer:
    """The stand-in for the `forward` of a layer or block."""

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.module, self.ranks = module, ranks
        self.bands = Bands(module, ranks)
        self.reach = reach(module)

    def __call__(self, x: Tensor, layout: LayoutLike, *, residual: Tensor | None = None, **more: Any) -> Tensor:
        layout, ranks = as_layout(layout), self.ranks
        if layout.sizes is not None or layout.is_packed or any(value is not None for value in more.values()):
            asked = [name for name, value in more.items() if value is not None] or ["sizes or packed images"]
            raise CapabilityError(f"split over ranks, a layer takes whole images and their tokens, no {asked[0]}")
        check_tokens(x, layout)
        height, width, prefix = layout.grid
        bounds = ranks.bounds(height, x, batch=x.shape[0], width=width, prefix=prefix, channels=x.shape[2])
        band = Band(Grid(bounds[-1], width, prefix), bounds, ranks.own, self.reach)
        beside = {} if residual is None else {"residual": residual}
        if ranks.own:  # prefix tokens go with the first row
            x, beside = x[:, prefix:], {name: t[:, prefix:] for name, t in beside.items()}
        with same_draws(self.module, ranks, x.device):
            out = self.bands.run(functools.partial(type(self.module).forward, self.module), x, band, beside)
        if not prefix:
            return out
        # The others give what is not read, as whoever gathers has to be a part of the graph.
        mine = out[:, :1].expand(-1, prefix, -1) if ranks.own else out[:, :prefix]
        first = ranks.gather(mine)[0]
        return torch.cat([first, out if ranks.own else out[:, prefix:]], dim=1)
