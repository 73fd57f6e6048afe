"""Checks of the Triton forms, over the mechanisms whose operators take one; without a GPU, in Triton's interpreter.

Small grids, because there an operation costs what it costs on a large one.
"""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from linsight.attention import run_rounds
from linsight.ops import Grid, Layout, tiles, use_form

from .geometry import some_kept
from .precision import HALVES, _run, _scales
from .subject import Subject, cast, close, random_tokens


class Ours(TorchDispatchMode):
    """Notes the names of this library's own operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "linsight":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@cache
def operators(subject: Subject) -> frozenset[str]:
    """The fused operators that the mechanism's layer runs, found without running them."""
    layer = subject.layer()
    with use_form("triton"), Ours() as ours, FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(1, 12, 16), Grid(3, 4))
    return frozenset(ours.names)


def _need_operators(subject: Subject) -> None:
    if not operators(subject):
        pytest.skip(f"{subject} takes no fused form")


def fused_equals_plain(subject: Subject) -> None:
    """Outputs and gradients in float64, with a prefix and NaN in dropped tokens where the mechanism has those."""
    _need_operators(subject)
    layer, grid = subject.layer().double(), Grid(3, 4, 1 if subject.can.prefix else 0)
    keep = some_kept(subject, 2, grid)
    x, kept = torch.randn(2, grid.tokens, 16, dtype=torch.float64), ... if keep is None else keep
    results = []
    for form in ("triton", "plain"):
        leaf = x.clone() if keep is None else x.masked_fill(~keep[..., None], float("nan"))
        leaf.requires_grad_()
        layer.zero_grad()
        with use_form(form):
            out = layer(leaf, grid, keep=keep)[kept]
            out.square().sum().backward()
        results.append([out, leaf.grad[kept], *(p.grad for p in layer.parameters())])
    for ours, plain in zip(*results, strict=True):
        close(ours, plain)


def fused_tiles_are_dense(subject: Subject) -> None:
    """The fused rounds over tiles equal the plain dense form."""
    subject.need("stream")
    _need_operators(subject)
    core, grid = subject.core().double(), Grid(4, 5, 1 if subject.can.prefix else 0)
    tokens = random_tokens(core, 1, grid, keep=some_kept(subject, 1, grid))
    with torch.no_grad():
        with use_form("plain"):
            dense = core(tokens, Layout(grid))
        with use_form("triton"):
            close(run_rounds(core, tokens, tiles(grid, 3, 5)), dense)


def fused_halves_are_finite_and_exact(subject: Subject) -> None:
    """Finite up to activations of 1e3, as the plain form; against float64 at most twice the error of plain float32."""
    _need_operators(subject)
    grid = Grid(5, 7)
    for dtype in HALVES:
        core = subject.core().to(dtype)
        tokens = random_tokens(core, 1, grid)
        with use_form("plain"):
            largest = next(scaled for _, scaled in _scales(core, tokens, grid, dtype))
            tokens = cast(tokens, dtype)
            with torch.no_grad():
                exact = copy.deepcopy(core).double()(cast(tokens, torch.float64), Layout(grid))
                plain = copy.deepcopy(core).float()(cast(tokens, torch.float32), Layout(grid)).to(dtype)
        with use_form("triton"):
            assert all(result.isfinite().all() and result.dtype == dtype for result in _run(core, largest, grid))
            with torch.no_grad():
                ours = core(tokens, Layout(grid))
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


# Once for each mechanism and for every other value of its options; then once for each mechanism.
VARIANT_CHECKS = (fused_equals_plain,)
CHECKS = (fused_tiles_are_dense, fused_halves_are_finite_and_exact)
