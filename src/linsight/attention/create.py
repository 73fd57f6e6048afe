"""Layers, cores and blocks by the name of their mechanism."""

import inspect
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch

from linsight.errors import CapabilityError, LinsightError

from .block import Block
from .core import Core
from .layer import Attention, Layer
from .parts.reduction import reduced
from .projections import PROJECTIONS
from .registry import mechanism

# Those of `Attention`, and what their values may be.
_LAYER_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "qkv_bias": (lambda value: isinstance(value, bool), "True or False"),
    "proj_bias": (lambda value: isinstance(value, bool), "True or False"),
    "proj_drop": (lambda value: isinstance(value, int | float) and 0 <= value <= 1, "a rate from 0 to 1"),
    "projections": (lambda value: value is None or value in PROJECTIONS, f"one of {', '.join(PROJECTIONS)}"),
    "reduction": (lambda value: _is_whole(value, 1), "a whole number, 1 or more"),
    "pool": (lambda value: _is_whole(value, 0), "a whole number, 0 for none"),
}


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
    projections, reduction (PVT's, of keys and values) and pool (PVTv2's, in its place).

    >>> layer = create_attention("inline", 64, 4)
    >>> layer(torch.randn(2, 1 + 6 * 10, 64), Grid(6, 10, prefix=1)).shape
    torch.Size([2, 61, 64])

    Raises:
        UnknownNameError: no such mechanism, option or value; the nearest is offered.
        LinsightError: `num_heads` does not divide `dim`, or the mechanism has no use for an option.
    """
    entry = mechanism(name)
    if entry.kind == "block":
        raise LinsightError(f"'{name}' is a whole block, not an attention layer: use it in a model")
    check_size(dim, num_heads, grid, divides=not options.get("head_dim"))
    check_factory(device, dtype)
    layer = {key: options.pop(key) for key in _LAYER_OPTIONS if key in options}
    for key, value in layer.items():
        fits, words = _LAYER_OPTIONS[key]
        if not fits(value):
            raise LinsightError(f"{key}={value!r} must be {words}")
    entry.check_options(options)
    if entry.kind == "layer":
        for key in sorted(layer.keys() - inspect.signature(entry.factory.__init__).parameters):
            raise LinsightError(f"{key}={layer[key]!r}: '{name}' is a layer with projections of its own, leave it out")
        place = entry.placed(grid, index)
        made = entry.factory(dim, num_heads, device=device, dtype=dtype, **place, **layer, **options)
        assert isinstance(made, Layer)
        return made
    place = {"grid": grid, "query_grid": grid, "index": index}
    if grid is not None:
        place["grid"] = reduced(grid, layer.get("reduction", 1), layer.get("pool", 0))
    core = create_core(name, dim, num_heads, device=device, dtype=dtype, **place, **options)
    if layer.get("qkv_bias") and not core.qkv_bias:
        raise LinsightError(f"qkv_bias=True: '{name}' projects queries, keys and values without a bias, leave it out")
    around: Any = core.layer or Attention
    return around(core, dim, device=device, dtype=dtype, **layer)


def check_factory(device: Any, dtype: Any) -> None:
    """Raise a LinsightError unless these are a device and a dtype of torch, or None."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise LinsightError(f"dtype={dtype!r} must be a torch.dtype, as torch.float32")
    try:
        torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise LinsightError(f"device={device!r} is no device of torch, as 'cpu' or 'cuda:0' are") from error


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
        CapabilityError: it has no rotary option, or none with the other options.
        LinsightError: the mechanism is more than a core.
    """
    entry = mechanism(name)
    if entry.kind != "core":
        raise LinsightError(f"'{name}' is a whole {entry.kind}, without a core of its own")
    check_size(dim, num_heads, grid, query_grid, divides=not options.get("head_dim"))
    entry.check_options(options)
    place = entry.placed(grid, index, query_grid)
    rotary = bool(getattr(entry.factory, "turns", "")) and options.pop("rotary", False)
    core = entry.factory(dim, num_heads, device=device, dtype=dtype, **place, **options)
    assert isinstance(core, Core)
    if rotary:
        _turn(core, name, dim // num_heads)
    return core


def _turn(core: Core, name: str, width: int) -> None:
    """Set the rotary option."""
    if width % 4:
        raise LinsightError(
            f"rotary=True turns each head by rows and by columns: its width must be divisible by 4, not {width}"
        )
    if core.unturned:
        raise CapabilityError(f"rotary=True of '{name}': {core.unturned}")
    core.rotary = core.placed = True


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
    check_size(dim, num_heads, grid)
    if not mlp_ratio > 0:
        raise LinsightError(f"mlp_ratio={mlp_ratio} must be above 0")
    entry.check_options(options)
    shared = {"mlp_ratio": mlp_ratio, "drop_path": drop_path, "device": device, "dtype": dtype}
    block = entry.factory(dim, num_heads, **shared, **entry.placed(grid, index), **options)
    assert isinstance(block, Block)
    return block


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_size(dim: int, num_heads: int, *grids: tuple[int, int] | None, divides: bool = True) -> None:
    """Raise a LinsightError unless `num_heads` divides `dim`, and grids are pairs, all whole numbers of 1 or more.

    divides: False where heads have a width of their own.
    """
    for name, value in (("dim", dim), ("num_heads", num_heads)):
        if not _is_whole(value, 1):
            raise LinsightError(f"{name}={value!r} must be a whole number, 1 or more")
    if divides and dim % num_heads:
        raise LinsightError(f"num_heads={num_heads} does not divide dim={dim}: choose a divisor of {dim}")
    for grid in grids:
        pair = isinstance(grid, tuple | list) and len(grid) >= 2
        if grid is not None and not (pair and all(_is_whole(side, 1) for side in grid[:2])):
            raise LinsightError(f"grid={grid!r} must be (height, width) in tokens, whole numbers of 1 or more")
