"""FAST against its dense definition, and what its normalisations do."""

import pytest
import torch

from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

OPTIONS = [{"order": 1}, {"order": 2}, {"norm": "layer"}]


def weights(tokens, order=2, norm="l2"):
    """f of all products, `(B, H, M, N)`."""

    def normed(x):
        x = x.transpose(1, 2)
        if norm == "l2":
            return x / x.norm(dim=-1, keepdim=True)
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    scores = normed(tokens.q) @ normed(tokens.k).transpose(-1, -2)
    return 1 + scores + (scores.square() / 2 if order == 2 else 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_core_is_its_dense_definition(options, causal):
    core, grid = create_core("fast", 16, 2, causal=causal, **options).double(), Grid(5, 7)
    tokens = random_tokens(core, 2, grid)
    w = weights(tokens, **options)
    w = w.tril() if causal else w
    truth = (w @ tokens.v.transpose(1, 2) / (w.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2)
    close(core(tokens, Layout(grid)), truth)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_are_not_negative(options):
    """So each output lies between the smallest and the largest value."""
    core, grid = create_core("fast", 16, 2, **options).double(), Grid(5, 7)
    tokens = random_tokens(core, 2, grid)
    out = core(tokens, Layout(grid)) / (1 - 1e-6)
    assert (weights(tokens, **options) >= 0).all()
    assert (out <= tokens.v.amax(dim=1, keepdim=True)).all() and (out >= tokens.v.amin(dim=1, keepdim=True)).all()


def test_length_has_no_effect():
    core, grid = create_core("fast", 16, 2).double(), Grid(3, 4)
    tokens = random_tokens(core, 1, grid)
    close(core(tokens._replace(q=tokens.q * 1e3, k=tokens.k * 1e-3), Layout(grid)), core(tokens, Layout(grid)))


def test_features_are_products_of_two_channels_once():
    """1 + d + d (d / 2 + 1) of them, about half of all pairs; zeros are zeros, with a gradient that is finite."""
    core = create_core("fast", 32, 2)
    x = torch.zeros(1, 3, 2, 16, requires_grad=True)
    mapped = core.features("q", x, None, ()).mapped()
    assert mapped.shape[-1] == 1 + 16 + 144
    mapped.sum().backward()
    assert torch.equal(mapped[..., 1:], torch.zeros_like(mapped[..., 1:])) and x.grad.isfinite().all()


def test_negative_weights_are_refused():
    with pytest.raises(LinsightError, match="order=1 with norm='layer' of 'fast'"):
        create_attention("fast", 16, 2, order=1, norm="layer")
