"""Layers, cores and blocks by the name of their mechanism."""

from typing import Any

import torch

from linsight.errors import LinsightError

from .block import Block
from .core import Core
from .layer import Attention, Layer
from .parts.reduction import reduced
from .projections import PROJECTIONS
from .registry import mechanism

_LAYER_OPTIONS = ("qkv_bias", "proj_bias", "proj_drop", "projections", "reduction", "pool")


def create_attention(
    name: str,
    dim: int,
    num_heads: int = 8,
    *,
    grid: tuple[int, int] | None = None,
    index: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Layer:
    """A layer of `dim` channels and `num_heads` heads with the mechanism `name`.

    `grid` is the height and width, in tokens, that position tables are made for, of mechanisms that have
    them: without it they have none. It does not limit the sizes that the layer works on. `index` is the place
    of the layer's block in a model, from 0, for mechanisms that differ from block to block. `options` are
    those of the mechanism (`linsight info NAME`) and of `Attention`: qkv_bias, proj_bias, proj_drop,
    projections, reduction (PVT's, of keys and values) and pool (PVTv2's).

    >>> layer = create_attention("inline", 64, 4)
    >>> layer(torch.randn(2, 1 + 6 * 10, 64), Grid(6, 10, prefix=1)).shape
    torch.Size([2, 61, 64])

    Raises:
        UnknownNameError: no such mechanism, option or value; the nearest is offered.
        LinsightError: `num_heads` does not divide `dim`.
    """
    entry = mechanism(name)
    if entry.kind == "block":
        raise LinsightError(f"'{name}' is a whole block, not an attention layer: use it in a model")
    if num_heads < 1 or dim % num_heads:
        raise LinsightError(f"num_heads={num_heads} does not divide dim={dim}: choose a divisor of {dim}")
    layer = {key: options.pop(key) for key in _LAYER_OPTIONS if key in options}
    if layer.get("projections") not in (None, *PROJECTIONS):
        raise LinsightError(f"unknown projections '{layer['projections']}': known are {', '.join(PROJECTIONS)}")
    entry.check_options(options)
    if entry.kind == "layer":
        place = entry.placed(grid, index)
        made = entry.factory(dim, num_heads, device=device, dtype=dtype, **place, **layer, **options)
        assert isinstance(made, Layer)
        return made
    place = {"grid": grid, "query_grid": grid, "index": index}
    if grid is not None:
        place["grid"] = reduced(grid, layer.get("reduction", 1), layer.get("pool", 0))
    core = create_core(name, dim, num_heads, device=device, dtype=dtype, **place, **options)
    around: Any = core.layer or Attention
    return around(core, dim, device=device, dtype=dtype, **layer)


def create_core(
    name: str,
    dim: int,
    num_heads: int,
    *,
    grid: tuple[int, int] | None = None,
    query_grid: tuple[int, int] | None = None,
    index: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Core:
    """The mechanism `name` without projections, for hosts that have their own. `grid` is that of the keys.

    `query_grid` is that of the queries, where it is another.

    Raises:
        UnknownNameError: no such mechanism, option or value.
        LinsightError: the mechanism is more than a core.
    """
    entry = mechanism(name)
    if entry.kind != "core":
        raise LinsightError(f"'{name}' is a whole {entry.kind}, without a core of its own")
    entry.check_options(options)
    place = entry.placed(grid, index, query_grid)
    core = entry.factory(dim, num_heads, device=device, dtype=dtype, **place, **options)
    assert isinstance(core, Core)
    return core


def is_block(name: str) -> bool:
    """True where the mechanism `name` replaces the block of its host."""
    return mechanism(name).kind == "block"


def create_block(
    name: str,
    dim: int,
    num_heads: int,
    *,
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    grid: tuple[int, int] | None = None,
    index: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Block:
    """A block of the mechanism `name`, which must be one of kind "block". `grid` and `index` as in `create_attention`.

    Raises:
        UnknownNameError: no such mechanism or option.
        LinsightError: the mechanism is an attention; hosts put that into a block of their own.
    """
    entry = mechanism(name)
    if entry.kind != "block":
        raise LinsightError(f"'{name}' is an attention, not a block: use create_attention")
    entry.check_options(options)
    shared = {"mlp_ratio": mlp_ratio, "drop_path": drop_path, "device": device, "dtype": dtype}
    block = entry.factory(dim, num_heads, **shared, **entry.placed(grid, index), **options)
    assert isinstance(block, Block)
    return block
