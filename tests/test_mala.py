"""MALA against the published steps, token by token; its weights, its cancelling terms, its small denominators."""

import copy

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import cast, close, random_tokens
from test_rala import make_core, turned

F64 = torch.float64


def bare(core):
    """The core without its convolution; `tokens.extra`, the gate, is for the caller to leave out."""
    for parameter in core.lepe.parameters():
        torch.nn.init.zeros_(parameter)
    return core


def published(core, tokens, grid):
    """The steps of the paper for one image; keys of dropped tokens are left out."""
    kept = range(grid.tokens) if tokens.keep is None else [i for i in range(grid.tokens) if tokens.keep[0, i]]
    places = [divmod(i, grid.width) for i in range(grid.tokens)]
    out = torch.zeros_like(tokens.v)
    for h in range(core.num_heads):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        scale = q.shape[1] ** -0.5
        q, k = F.elu(q) + 1, F.elu(k) + 1
        mean_k, mean_v = k[kept].mean(0), v[kept].mean(0)
        for i in range(grid.tokens):
            z = scale * q[i] @ mean_k
            turned_q = turned(q[i], *places[i], core.angle)
            total = sum((turned_q @ turned(k[j], *places[j], core.angle)) * v[j] for j in kept)
            out[0, i, h] = scale / len(kept) * total * (1 + 1 / (z + 1e-6)) - z * mean_v
    return out.flatten(2) * tokens.extra


@pytest.mark.parametrize("grid", [Grid(4, 5), Grid(1, 7), Grid(1, 1)], ids=str)
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_the_published_steps(grid, dropping):
    core = bare(make_core("mala"))
    keep = torch.arange(grid.tokens)[None] % 3 != 1 if dropping else None
    tokens = random_tokens(core, 1, grid, keep=keep)
    close(core(tokens, Layout(grid)).flatten(2), published(core, tokens, grid))


def test_weights_sum_to_one_and_may_be_negative():
    """At one place, where nothing turns: what is read of 1 is 1, of a single 1 may be below 0."""
    core, grid = bare(make_core("mala")), Grid(1, 1, 5)
    tokens = random_tokens(core, 1, grid)
    tokens = tokens._replace(extra=torch.ones_like(tokens.extra))
    close(core(tokens._replace(v=torch.ones_like(tokens.v)), Layout(grid)), torch.ones_like(tokens.v), 1e-5)
    weights = [
        core(tokens._replace(v=tokens.v * 0 + one[:, None, None]), Layout(grid)) for one in torch.eye(6).double()
    ]
    assert min(weight.min() for weight in weights) < 0


def test_the_cancelling_terms_keep_their_digits():
    """At one place keys and values around 1000: both terms of the paper are 2e6 times the deviations that are left."""
    core, grid = bare(create_core("mala", 16, 2)), Grid(1, 1, 300)
    tokens = random_tokens(core, 1, grid)
    tokens = cast(tokens._replace(k=tokens.k + 1000, v=tokens.v + 1000), torch.float32)
    ours = core(tokens, Layout(grid))
    exact = copy.deepcopy(core).double()(cast(tokens, F64), Layout(grid))
    assert (ours - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_far_below_zero(dtype):
    """f is 1e-7 there, which half precision rounds to 0, and 1 / z is 1e6: all in float32."""
    core, grid = bare(create_core("mala", 16, 2)).to(dtype), Grid(3, 4)
    tokens = random_tokens(core, 1, grid)
    tokens = cast(tokens._replace(k=tokens.k - 16), dtype).each(lambda x: x.requires_grad_())
    out = core(tokens, Layout(grid))
    exact = copy.deepcopy(core).double()(cast(tokens, F64), Layout(grid))
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), tokens[:3]))


def test_published_keys_are_those_of_rala():
    state, rala = (linsight.export_published(create_attention(name, 16, 2)) for name in ("mala", "rala"))
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in rala.items()}
