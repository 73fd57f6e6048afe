"""ESSA against its definition, and tokens without any deviation over their channels."""

import pytest
import torch
from torch.nn import functional as F

from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

F64 = torch.float64


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("grid", [Grid(9, 16), Grid(1, 1), Grid(3, 5, 2)], ids=str)
def test_core_is_its_definition(grid, heads):
    """Queries are normed over channels, keys over tokens."""
    core = create_core("essa", 24, heads).double()
    tokens = random_tokens(core, 2, grid, 24)

    def share(x):
        x = x.transpose(1, 2)
        x = (x - x.mean(dim=-1, keepdim=True)) ** 2
        return x / (x.sum(dim=-1, keepdim=True) + 1e-7)

    q, k = F.normalize(share(tokens.q), dim=-1), F.normalize(share(tokens.k), dim=-2)
    v = tokens.v.transpose(1, 2)
    truth = v + q @ (k.transpose(-1, -2) @ v) / grid.tokens**0.5
    close(core(tokens, Layout(grid)).transpose(1, 2), truth)


def test_tokens_of_equal_channels_are_the_values():
    """Their features are 0, and so are the norms: v is left, with finite gradients."""
    core, grid = create_core("essa", 16, 2), Grid(2, 3)
    tokens = random_tokens(core, 1, grid)
    flat = torch.ones_like(tokens.q).requires_grad_()
    out = core(tokens._replace(q=flat, k=flat), Layout(grid))
    close(out, tokens.v)
    (gradient,) = torch.autograd.grad(out.square().sum(), flat)
    assert gradient.isfinite().all()
