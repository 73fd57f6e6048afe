"""Local linear attention against the published sums, its limits, and where those sums are close to 0."""

import pytest
import torch

from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import cast, close, random_tokens

F64 = torch.float64


def published(tokens, ridge, causal):
    """The paper's sums, query by query."""
    out, width = torch.zeros_like(tokens.v), tokens.k.shape[-1]
    for b, h, i in torch.cartesian_prod(
        *map(torch.arange, (*tokens.v.shape[::2][:1], tokens.v.shape[2], tokens.q.shape[1]))
    ):
        seen = range(int(i) + 1 if causal else tokens.k.shape[1])
        q, k, v = tokens.q[b, i, h], tokens.k[b, seen, h], tokens.v[b, seen, h]
        w = (k @ q * width**-0.5).exp()
        apart = k - q
        mu = w @ apart
        sigma = (apart * w[:, None]).T @ apart + ridge * w.sum() * torch.eye(width, dtype=F64)
        rho = torch.linalg.solve(sigma, mu)
        out[b, i, h] = (w * (1 - apart @ rho)) @ v / (w.sum() - mu @ rho)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_core_is_the_published_sums(ridge, causal):
    core, grid = create_core("lla", 8, 2, ridge=ridge, causal=causal).double(), Grid(3, 5)
    tokens = random_tokens(core, 2, grid, 8)
    close(core(tokens, Layout(grid)), published(tokens, ridge, causal), 1e-9)


def test_a_large_ridge_is_softmax_attention():
    grid = Grid(3, 5)
    core, softmax = (create_core(name, 8, 2).double() for name in ("lla", "softmax"))
    core.ridge = 1e9
    tokens = random_tokens(core, 2, grid, 8)
    close(core(tokens, Layout(grid)), softmax(tokens, Layout(grid)), 1e-6)


def test_values_linear_in_keys_are_found():
    """What a regression is for: v = A k + b is read at the query itself, as lambda goes to 0."""
    core, grid = create_core("lla", 8, 2, ridge=1e-9).double(), Grid(5, 8)
    tokens = random_tokens(core, 1, grid, 8)
    matrix = torch.randn(4, 4, dtype=F64)
    tokens = tokens._replace(v=tokens.k @ matrix + 3)
    close(core(tokens, Layout(grid)), tokens.q @ matrix + 3, 1e-5)


def test_keys_far_from_zero_keep_their_digits():
    """Products of uncentred keys are 10000 here, of which float32 knows a thousandth: as much as covariances are."""
    core, grid = create_core("lla", 8, 2, ridge=0.1), Grid(6, 6)
    tokens = random_tokens(core, 1, grid, 8)
    tokens = cast(tokens._replace(k=tokens.k + 100), torch.float32)
    exact = core.double()(cast(tokens, F64), Layout(grid))
    assert (core.float()(tokens, Layout(grid)) - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_a_ridge_of_zero_is_refused():
    with pytest.raises(LinsightError, match="ridge=0 of 'lla'"):
        create_attention("lla", 16, 2, ridge=0)
