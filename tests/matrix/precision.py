"""Checks of numbers: finite where they can be, as exact as float32, and no loss over long sequences."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from linsight.attention import PROJECTIONS, Core, Cost, Tokens, drive
from linsight.ops import Grid, Layout, Tile

from .subject import Subject, cast, random_tokens

HALVES = (torch.float16, torch.bfloat16)
MILLION = Grid(1000, 1000)


def _run(core: Core, tokens: Tokens, grid: Grid) -> list[Tensor]:
    """The output, and the gradients of its mean by what a layer projects, and by all else that the core uses."""
    leaves = {name: getattr(tokens, name).detach().requires_grad_() for name in drawn(tokens)}
    out = core(tokens._replace(**leaves), Layout(grid))
    weights = torch.ones_like(out) / out.shape[1]
    gradients = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    projected = {part for projection in PROJECTIONS[core.projections] for part in projection.parts}
    used = [g for name, g in zip(leaves, gradients, strict=True) if g is not None or name in projected]
    assert all(g is not None for g in used), "a part that is projected is not used"
    return [out.detach(), *used]


def drawn(tokens: Tokens) -> list[str]:
    """Which tokens a core may read as queries, keys, values and more."""
    return ["q", "k", "v"] if tokens.extra is None else ["q", "k", "v", "extra"]


def _scales(core: Core, tokens: Tokens, grid: Grid, dtype: torch.dtype) -> Iterator[tuple[float, Tokens]]:
    """1e3 and every tenth of it whose results, computed in float64, `dtype` can hold."""
    limit = torch.finfo(dtype).max
    for scale in (1e3, 1e2, 1e1, 1.0):
        scaled = tokens._replace(**{name: getattr(tokens, name) * scale for name in (*drawn(tokens), "x")})
        scaled = cast(scaled, dtype)
        exact = _run(copy.deepcopy(core).double(), cast(scaled, torch.float64), grid)
        if max(t.abs().max().item() for t in exact) < limit:
            yield scale, scaled


def half_models_are_finite(subject: Subject) -> None:
    """Outputs and gradients are finite at activations up to 1e3, wherever the dtype can hold the result."""
    grid = Grid(8, 8)
    for dtype in HALVES:
        core = subject.core().to(dtype)
        tokens, scales = random_tokens(core, 2, grid), []
        for scale, scaled in _scales(core, tokens, grid, dtype):
            scales.append(scale)
            for result in _run(core, scaled, grid):
                assert result.dtype == dtype
                assert result.isfinite().all(), f"{dtype} at {scale:g}"
        assert 1.0 in scales, f"{dtype}: not even activations of 1 give a representable result"
        assert dtype != torch.bfloat16 or "exp" in str(subject) or core.largest in scales
        layer = subject.layer().to(dtype)
        x = torch.randn(2, 64, 16, dtype=dtype, requires_grad=True)
        layer(x, grid).sum().backward()
        assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *layer.parameters()))


def error_is_that_of_float32(subject: Subject) -> None:
    """Against float64, at most twice the error of float32 arithmetic rounded once at the end."""
    grid = Grid(16, 16)
    for dtype in HALVES:
        core = subject.core().to(dtype)
        tokens = cast(random_tokens(core, 2, grid), dtype)
        with torch.no_grad():
            ours = core(tokens, Layout(grid)).double()
            plain = copy.deepcopy(core).float()(cast(tokens, torch.float32), Layout(grid)).to(dtype).double()
            exact = copy.deepcopy(core).double()(cast(tokens, torch.float64), Layout(grid))
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


def states_are_full_precision(subject: Subject) -> None:
    """States are float32 in half models and under autocast, float64 in float64."""
    subject.need("stream")
    grid = Grid(4, 4)
    for dtype in (*HALVES, torch.float32, torch.float64):
        core = subject.core().to(dtype)
        tokens, done = cast(random_tokens(core, 1, grid), dtype), ()
        for now in core.rounds:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                state = now.absorb(core, tokens, Tile.whole(grid), done)
                done += (now.finish(core, state, done),)
            wanted = torch.promote_types(dtype, torch.float32)
            for leaf in tree_leaves((state, done)):
                assert not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dtype == wanted


def autocast_is_finite(subject: Subject) -> None:
    """bfloat16 autocast at activations of 1e3, forward and backward, and the core untouched by it."""
    grid, layer = Grid(8, 8), subject.layer()
    x = (torch.randn(2, 64, 16) * getattr(subject.entry.factory, "largest", 1e3)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, grid)
        out.float().mean().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))
    if subject.entry.can("stream") and subject.entry.kind == "core":
        tokens = cast(random_tokens(layer.core, 2, grid), torch.float32)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            inside = layer.core(tokens, Layout(grid))
        torch.testing.assert_close(inside, layer.core(tokens, Layout(grid)))


def long_sequences(subject: Subject) -> None:
    """As many tokens as a photograph has patches, see `a_million_tokens`."""
    a_million_tokens(subject, Grid(256, 256))


def a_million_tokens(subject: Subject, grid: Grid = MILLION) -> None:
    """Tokens around 100, of which a corner is read: float32 keeps five digits, halves hold what they can.

    Of each mechanism whose cost is linear. Of a core without states that merge all outputs are read, and so are those
    of a layer or a block, which see tokens around 0: a norm of their own would make the rounding of 100 their result.
    """
    streams = subject.entry.can("stream")
    if not streams and subject.entry.structure.cost is not Cost.LINEAR:
        pytest.skip(f"{subject} is not linear: {subject.entry.complexity}")
    model: nn.Module
    if subject.entry.kind == "core":
        model = core = subject.core(4, 1)
        tokens = random_tokens(core, 1, grid, 4)
        tokens = tokens._replace(k=tokens.k + 100, v=tokens.v + 100, x=tokens.x + 100)
        read = _read_corner if streams else _read_all
    else:
        x = torch.randn(1, grid.tokens, 4, dtype=torch.float64)
        model, tokens, read = subject.layer(4, 1), Tokens(x, x, x), _of_layer
    with torch.no_grad():
        exact = read(copy.deepcopy(model).double(), tokens, grid)
        ours = read(model, cast(tokens, torch.float32), grid)
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
        for dtype in HALVES:
            half = read(copy.deepcopy(model).to(dtype), cast(tokens, dtype), grid)
            assert half.dtype == dtype
            assert half[exact.abs() < torch.finfo(dtype).max].isfinite().all()


def _read_corner(core: Any, tokens: Tokens, grid: Grid) -> Tensor:
    whole = Tile.whole(grid)
    done = drive(core, lambda now: [(core.placed_tokens(tokens, whole), whole)])
    corner = Tile(grid, 0, 0, 16, 16, halo=core.halo)
    return core.read(core.placed_tokens(tokens.each(corner.take), corner), corner, done)


def _read_all(core: Any, tokens: Tokens, grid: Grid) -> Tensor:
    return core(tokens, Layout(grid))


def _of_layer(layer: Any, tokens: Tokens, grid: Grid) -> Tensor:
    return layer(tokens.q, grid)


def no_number_is_left_unwritten(subject: Subject) -> None:
    """Fresh memory is full of NaN, which must not reach outputs and gradients."""
    layer, grid = subject.layer(), Grid(5, 7)
    with poisoned():
        x = torch.randn(2, grid.tokens, 16, requires_grad=True)
        out = layer(x, grid)
        out.sum().backward()
    assert all(t is not None and t.isfinite().all() for t in (out, x.grad, *(p.grad for p in layer.parameters())))


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that torch allocates is NaN before it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
