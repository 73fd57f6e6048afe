"""NaLaFormer and its softmax form against the published steps, token by token; queries of norm 0, large cubes, keys."""

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


def published(core, tokens, grid, softmax):
    """The steps of the paper for one image, up to the convolution; keys of dropped tokens are left out."""
    kept = range(grid.tokens) if tokens.keep is None else [i for i in range(grid.tokens) if tokens.keep[0, i]]
    places = [divmod(i, grid.width) for i in range(grid.tokens)]
    out = torch.zeros_like(tokens.v)
    for h in range(core.num_heads):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        if softmax:
            turned_k = torch.stack([turned(k[j], *places[j], core.angle) for j in kept])
            for i in range(grid.tokens):
                scores = turned_k @ turned(q[i], *places[i], core.angle) * q.shape[1] ** -0.5
                out[0, i, h] = scores.softmax(0) @ v[kept]
            continue
        parts = [(k[j] ** 3).relu() for j in range(len(k))], [(-(k[j] ** 3)).relu() for j in range(len(k))]
        for i in range(grid.tokens):
            norm = q[i].square().sum().sqrt()
            above, below = 0, 0
            for sign, keys in zip((1, -1), parts, strict=True):
                query = ((sign * q[i]).relu() / norm) ** (3 * (0.5 + norm.tanh()))
                turned_q = turned(query, *places[i], core.angle)
                above = above + sum((turned_q @ turned(keys[j], *places[j], core.angle)) * v[j] for j in kept)
                below = below + sum(query @ keys[j] for j in kept)
            out[0, i, h] = above / len(kept) / (below / len(kept) + 1e-6)
    normed = F.layer_norm(out.flatten(2), (out.flatten(2).shape[2],), core.ln.weight, core.ln.bias)
    return normed * F.silu(tokens.extra)


@pytest.mark.parametrize("name", ["nalaformer", "nalaformer_softmax"])
@pytest.mark.parametrize("grid", [Grid(4, 5), Grid(1, 7), Grid(1, 1)], ids=str)
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_the_published_steps(name, grid, dropping):
    core = make_core(name)
    for parameter in core.lepe.parameters():
        torch.nn.init.zeros_(parameter)
    for parameter in core.ln.parameters():
        torch.nn.init.normal_(parameter)
    keep = torch.arange(grid.tokens)[None] % 3 != 1 if dropping else None
    tokens = random_tokens(core, 1, grid, keep=keep)
    close(core(tokens, Layout(grid)).flatten(2), published(core, tokens, grid, name == "nalaformer_softmax"))


def test_a_query_of_norm_zero_reads_nothing():
    """The published code divides 0 by 0 there."""
    core, grid = create_core("nalaformer", 16, 2), Grid(2, 3)
    tokens = cast(random_tokens(core, 1, grid), torch.float32)
    tokens.q[:, 2] = 0
    q = tokens.q.clone().requires_grad_()
    out = core(tokens._replace(q=q), Layout(grid))
    assert out.isfinite().all()
    others = core(tokens._replace(k=-tokens.k.roll(1, dims=1)), Layout(grid))
    close(others[:, 2], out[:, 2], 0.0)
    assert (others[:, 3] - out[:, 3]).abs().max() > 1e-2
    (gradient,) = torch.autograd.grad(out.square().sum(), q)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cubes_are_made_in_float32(dtype):
    """Keys of 300: their cube is 400 times the largest float16."""
    core, grid = create_core("nalaformer", 16, 2).to(dtype), Grid(4, 4)
    tokens = random_tokens(core, 1, grid)
    tokens = cast(tokens._replace(k=tokens.k * 300), dtype)
    exact = copy.deepcopy(core).double()(cast(tokens, F64), Layout(grid))
    assert (core(tokens, Layout(grid)) - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["nalaformer", "nalaformer_softmax"])
def test_published_keys(name):
    state = linsight.export_published(create_attention(name, 16, 2))
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        "core.angle": (4,),  # of a stage there
        "qkvg.weight": (64, 16),
        "qkvg.bias": (64,),
        "lepe.weight": (16, 1, 5, 5),
        "lepe.bias": (16,),
        "ln.weight": (16,),
        "ln.bias": (16,),
        "out_proj.weight": (16, 16),
        "out_proj.bias": (16,),
    }
