"""YOSO: hashes against a loop over pairs, their mean and gradient against the expectation, its mistakes."""

import math

import pytest
import torch

from linsight import create_attention
from linsight.attention import create_core, run_rounds
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout, tiles
from matrix.subject import close, random_tokens

F64 = torch.float64


def estimate(core, q, k):
    """p of queries `(M, D)` and keys `(N, D)`: how many hashes they share."""
    hashes = [[[bool(plane @ x > 0) for plane in planes] for planes in core.planes] for x in (*q, *k)]
    same = [[sum(map(list.__eq__, a, b)) for b in hashes[len(q) :]] for a in hashes[: len(q)]]
    return torch.tensor(same, dtype=F64)


def expected(q, k, bits, scale=1.0):
    """p of queries and keys of one head, pair by pair."""
    cosines = [[(a @ b / (a.norm() * b.norm())).clamp(-1, 1).item() * scale for b in k] for a in q]
    return torch.tensor([[(1 - math.acos(c) / math.pi) ** bits for c in row] for row in cosines], dtype=F64)


@pytest.mark.parametrize("form", ["sampled", "pairs", "expectation"])
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_its_pairs(form, dropping):
    core, grid = create_core("yoso", 8, 2, form=form, hashes=3, bits=2).double(), Grid(3, 4, 1)
    kept = torch.arange(grid.tokens) % 3 != 1 if dropping else torch.ones(grid.tokens, dtype=torch.bool)
    tokens = random_tokens(core, 1, grid, dim=8, keep=kept[None] if dropping else None)
    out = core(tokens, Layout(grid))
    for h in range(2):
        q, k, v = (x[0, kept, h] for x in tokens[:3])
        y = (expected(q, k, 2, 0.98) if form == "expectation" else estimate(core, q, k)) @ v
        close(out[0, kept, h], y / y.norm(dim=-1, keepdim=True).clamp(min=1e-12))


def test_hashes_estimate_the_expectation():
    core, tokens = create_core("yoso", 6, 1, hashes=4000, bits=3).double(), torch.randn(5, 6, dtype=F64)
    shares = estimate(core, tokens, tokens) / 4000
    assert (shares - expected(tokens, tokens, 3)).abs().max() < 0.05


@pytest.mark.parametrize(("form", "cut"), [("sampled", False), ("sampled", True), ("pairs", False)])
def test_gradients_are_the_published_ones(form, cut):
    """Those of y = P v, P the estimate and a constant but for a slope of (t / 2) P by the cosine; over tiles, too."""
    core, grid = create_core("yoso", 4, 1, form=form, hashes=6, bits=2).double(), Grid(3, 4)
    leaves = [torch.randn(1, 12, 1, 4, dtype=F64, requires_grad=True) for _ in range(3)]
    tokens = random_tokens(core, 1, grid, dim=4)._replace(q=leaves[0], k=leaves[1], v=leaves[2])
    out = run_rounds(core, tokens, tiles(grid, 2, 3)) if cut else core(tokens, Layout(grid))
    q, k, v = (x[0, :, 0] for x in leaves)
    share = estimate(core, q, k)
    cosines = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).T
    y = share @ v + (share * (cosines - cosines.detach())) @ v.detach()
    truth = torch.nn.functional.normalize(y, dim=-1)
    weights = torch.randn_like(truth)
    close(out[0, :, 0], truth)
    ours = torch.autograd.grad((out[0, :, 0] * weights).sum(), leaves)
    for own, right in zip(ours, torch.autograd.grad((truth * weights).sum(), leaves), strict=True):
        assert right.abs().max() > 0.01
        close(own, right)


def test_gradients_of_the_expectation():
    core, grid = create_core("yoso", 4, 1, form="expectation", bits=3).double(), Grid(2, 3)
    leaves = [torch.randn(1, 6, 1, 4, dtype=F64, requires_grad=True) for _ in range(3)]
    tokens = random_tokens(core, 1, grid, dim=4)
    assert torch.autograd.gradcheck(lambda q, k, v: core(tokens._replace(q=q, k=k, v=v), Layout(grid)), leaves)


def test_hashes_are_drawn():
    layer, x = create_attention("yoso", 16, 2).eval(), torch.randn(1, 64, 16)
    out = layer(x, Grid(8, 8))
    assert torch.equal(layer(x, Grid(8, 8)), out)
    layer.core.redraw()
    assert not torch.allclose(layer(x, Grid(8, 8)), out)


def test_mistakes_are_told():
    for mistake in ({"hashes": 0}, {"bits": 0}, {"bits": 17}, {"cosine_scale": 0.0}, {"cosine_scale": 1.1}):
        with pytest.raises(LinsightError, match=next(iter(mistake))):
            create_attention("yoso", 16, 2, **mistake)
