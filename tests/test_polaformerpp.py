"""PolaFormer++ against the published steps, token by token; its exponents, its keys."""

import copy

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import cast, close, random_tokens
from test_rala import turned

F64 = torch.float64


def make_core():
    """Without its convolution, and with any angles and temperatures."""
    core = create_core("polaformerpp", 16, 2).double()
    for tensor in (core.angle, core.s1, core.s2):
        torch.nn.init.normal_(tensor)
    for parameter in core.lepe.parameters():
        torch.nn.init.zeros_(parameter)
    return core


def published(core, tokens, grid):
    """The steps of the paper for one image; keys of dropped tokens are left out."""
    kept = range(grid.tokens) if tokens.keep is None else tokens.keep[0].nonzero()[:, 0].tolist()
    places = [divmod(i, grid.width) for i in range(grid.tokens)]
    out = torch.zeros_like(tokens.v)
    for h in range(2):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        keys = [torch.cat([k[j].relu(), (-k[j]).relu()]).exp() - 1 for j in range(grid.tokens)]
        for i in range(grid.tokens):
            streams = []
            for sign, s, values in ((1, core.s1, v[:, :4]), (-1, core.s2, v[:, 4:])):
                x = torch.cat([(sign * q[i]).relu(), (-sign * q[i]).relu()])
                query = (x * s[0, h, 0].sigmoid()).exp() - 1
                below = query @ sum(keys[j] for j in kept) / len(kept) + 1e-6
                turned_q = turned(query, *places[i], core.angle)
                above = sum((turned_q @ turned(keys[j], *places[j], core.angle)) * values[j] for j in kept)
                streams.append(above / len(kept) / below)
            out[0, i, h] = torch.cat(streams)
    return out.flatten(2) * tokens.extra


@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(1, 1)], ids=str)
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_the_published_steps(grid, dropping):
    core = make_core()
    keep = torch.arange(grid.tokens)[None] % 3 != 1 if dropping else None
    tokens = random_tokens(core, 1, grid, keep=keep)
    close(core(tokens, Layout(grid)).flatten(2), published(core, tokens, grid))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_exponents_do_not_overflow(dtype):
    """At one place, where nothing turns: with a key of 100, exp(k) is no number of float32, but its share is."""
    core, grid = make_core().float().to(dtype), Grid(1, 1, 6)
    tokens = random_tokens(core, 1, grid)
    tokens = cast(tokens._replace(k=tokens.k * (100 / tokens.k.abs().max())), dtype)
    exact = copy.deepcopy(core).double()(cast(tokens, F64), Layout(grid))
    assert (core(tokens, Layout(grid)) - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_published_keys():
    state = linsight.export_published(create_attention("polaformerpp", 16, 2))
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        "core.angle": (8,),  # of a stage there
        "s1": (1, 2, 1, 16),
        "s2": (1, 2, 1, 16),
        "qkvg.weight": (64, 16),
        "qkvg.bias": (64,),
        "lepe.weight": (16, 1, 5, 5),
        "lepe.bias": (16,),
        "proj.weight": (16, 16),
        "proj.bias": (16,),
    }
