"""The reflections of MirrorLA: orthogonal, per head and block, the identity at the start; what ReLU then keeps."""

import pytest
import torch

from linsight.attention import create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

F64 = torch.float64


def householder(core, head):
    """H of a head, as a matrix."""
    parts = []
    for block in range(core.blocks):
        matrix = torch.eye(core.mirrors.shape[-1], dtype=F64)
        for mirror in core.mirrors:
            u = mirror[head, block]
            matrix = (torch.eye(len(u), dtype=F64) - 2 * torch.outer(u, u) / (u @ u + 1e-6)) @ matrix
        parts.append(matrix)
    return torch.block_diag(*parts)


@pytest.mark.parametrize("options", [{"reflections": 3}, {"blocks": 2}], ids=str)
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_its_weights(options, dropping):
    core, grid = create_core("mirrorla", 16, 2, **options).double(), Grid(3, 4, 1)
    torch.nn.init.normal_(core.mirrors)
    keep = torch.arange(13)[None] % 3 != 1 if dropping else None
    tokens = random_tokens(core, 1, grid, keep=keep)
    kept, truth = slice(None) if keep is None else keep[0], torch.zeros_like(tokens.v)
    for h in range(2):
        turn = householder(core, h)
        close(turn @ turn.T, torch.eye(8, dtype=F64), 1e-4)  # orthogonal, but for the constant below the line
        q, k = ((x[0, :, h] @ turn.T).relu() for x in tokens[:2])
        weights = q @ k[kept].T
        truth[0, :, h] = weights @ tokens.v[0, kept, h] / (weights.sum(1, keepdim=True) + 1e-6)
    close(core(tokens, Layout(grid)), truth)


@pytest.mark.parametrize(("reflections", "alike"), [(0, True), (2, True), (4, True), (1, False), (3, False)])
def test_pairs_start_as_the_identity(reflections, alike):
    core, grid = create_core("mirrorla", 16, 2, reflections=reflections).double(), Grid(3, 4)
    tokens, plain = random_tokens(core, 1, grid), create_core("linear", 16, 2, feature_map="relu")
    assert torch.allclose(core(tokens, Layout(grid)), plain(tokens, Layout(grid)), atol=1e-4) == alike


def test_a_pair_learns_apart():
    """Equal reflections get gradients that part them."""
    core, grid = create_core("mirrorla", 16, 2).double(), Grid(3, 4)
    core(random_tokens(core, 1, grid), Layout(grid)).square().sum().backward()
    first, second = core.mirrors.grad
    assert (first - second).abs().max() > 1e-3


def test_mistakes_are_told():
    for options in ({"reflections": -1}, {"blocks": 3}, {"blocks": 0}):
        ((name, value),) = options.items()
        with pytest.raises(LinsightError, match=f"{name}={value} of 'mirrorla'"):
            create_core("mirrorla", 16, 2, **options)
