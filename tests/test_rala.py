"""RALA and its softmax form against the published steps, token by token; its angles, its peaks, its keys."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import cast, close, random_tokens

F64 = torch.float64


def make_core(name="rala", dim=16, heads=2):
    """One whose angles are any numbers, as those of the golden cases are: no two channels of a pair share one."""
    core = create_core(name, dim, heads).double()
    torch.nn.init.normal_(core.angle)
    return core


def turned(x, row, column, angle):
    """A vector of D channels: pairs turn by the row in the first half, by the column in the second."""
    out, half = x.clone(), len(x) // 2
    for i in range(0, len(x), 2):
        place, at = (row, i) if i < half else (column, i - half)
        first, second = place * angle[at], place * angle[at + 1]
        out[i] = x[i] * math.cos(first) - x[i + 1] * math.sin(first)
        out[i + 1] = x[i + 1] * math.cos(second) + x[i] * math.sin(second)
    return out


def published(core, tokens, grid, softmax):
    """The steps of the paper for one image, without prefix tokens; keys of dropped tokens are left out."""
    kept = range(grid.tokens) if tokens.keep is None else [i for i in range(grid.tokens) if tokens.keep[0, i]]
    places = [divmod(i, grid.width) for i in range(grid.tokens)]
    out = torch.zeros_like(tokens.v)
    for h in range(core.num_heads):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        width, count = q.shape[1], len(kept)
        if softmax:
            scale = width**-0.5
            turned_k = {j: turned(k[j], *places[j], core.angle) for j in kept}
            for i in range(grid.tokens):
                turned_q = turned(q[i], *places[i], core.angle)
                weights = torch.stack([scale * turned_q @ turned_k[j] for j in kept]).softmax(0)
                out[0, i, h] = sum(w * v[j] for w, j in zip(weights, kept, strict=True))
            continue
        q, k = F.elu(q) + 1, F.elu(k) + 1
        g = sum(q[i] for i in kept) / count
        alpha = torch.stack([width**-0.5 * g @ k[j] for j in kept]).softmax(0)
        k = {j: count * a * k[j] for a, j in zip(alpha, kept, strict=True)}
        mean = sum(k.values()) / count
        for i in range(grid.tokens):
            turned_q = turned(q[i], *places[i], core.angle)
            total = sum((turned_q @ turned(k[j], *places[j], core.angle)) * v[j] / count for j in kept)
            out[0, i, h] = total / (q[i] @ mean + 1e-6)
    v = tokens.v if tokens.keep is None else tokens.v * tokens.keep[..., None, None]
    local = core.lepe.weight.shape[0]
    canvas = v.reshape(1, grid.height, grid.width, local).permute(0, 3, 1, 2)
    local = F.conv2d(canvas, core.lepe.weight, core.lepe.bias, padding=2, groups=local).flatten(2).transpose(1, 2)
    return (out.flatten(2) + local) * tokens.extra


@pytest.mark.parametrize("name", ["rala", "rala_softmax"])
@pytest.mark.parametrize("grid", [Grid(4, 5), Grid(1, 7), Grid(1, 1)], ids=str)
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_the_published_steps(name, grid, dropping):
    core = make_core(name)
    keep = torch.arange(grid.tokens)[None] % 3 != 1 if dropping else None
    tokens = random_tokens(core, 1, grid, keep=keep)
    truth = published(core, tokens, grid, name == "rala_softmax")
    close(core(tokens, Layout(grid)).flatten(2), truth)


@pytest.mark.parametrize("name", ["rala", "rala_softmax"])
def test_prefix_tokens_have_no_place(name):
    """Their order tells nothing; and at the origin, where nothing turns, the grid token is one of them."""
    core, grid = make_core(name), Grid(3, 4, 2)
    tokens = random_tokens(core, 1, grid)
    order = [1, 0, *range(2, 14)]
    close(core(tokens.each(lambda x: x[:, order]), Layout(grid)), core(tokens, Layout(grid))[:, order])
    for parameter in core.lepe.parameters():
        torch.nn.init.zeros_(parameter)
    tokens, grid = random_tokens(core, 1, Grid(1, 1, 1)), Grid(1, 1, 1)
    close(core(tokens.each(lambda x: x.flip(1)), Layout(grid)).flip(1), core(tokens, Layout(grid)))


def test_angles_start_as_published_and_are_loaded():
    layer = create_attention("rala", 64, 2)  # heads of 32
    speeds = [10000 ** -(i / 7) for i in range(8) for _ in range(2)]
    torch.testing.assert_close(layer.core.angle, torch.tensor(speeds))
    state = layer.state_dict()
    state["core.angle"] = torch.arange(16.0)
    layer.load_state_dict(state)
    assert torch.equal(layer.core.angle, torch.arange(16.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_peak_is_not_rounded_away(dtype):
    """One of 3136 tokens takes all of the weight: N a k is 3e5 there, above the largest float16."""
    grid = Grid(56, 56)
    core = create_core("rala", 8, 2).to(dtype)
    tokens = random_tokens(core, 1, grid, dim=8)
    tokens.k[:, 77] = 100
    tokens = cast(tokens, dtype)
    with torch.no_grad():
        ours = core(tokens, Layout(grid))
        exact = copy.deepcopy(core).double()(cast(tokens, F64), Layout(grid))
    assert ours.isfinite().all()
    assert (ours - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["rala", "rala_softmax"])
def test_published_keys(name):
    """1x1 convolutions there; the fourth part of the first is the gate."""
    layer = create_attention(name, 16, 2)
    state = linsight.export_published(layer)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert shapes == {
        "core.angle": (4,),  # of a stage there
        "qkvo.weight": (64, 16, 1, 1),
        "qkvo.bias": (64,),
        "lepe.weight": (16, 1, 5, 5),
        "lepe.bias": (16,),
        "proj.weight": (16, 16, 1, 1),
        "proj.bias": (16,),
    }
    state["qkvo.weight"][48:], state["qkvo.bias"][48:] = 0, 0
    linsight.load_published(layer, state)
    x = torch.randn(1, 6, 16)
    torch.testing.assert_close(layer(x, Grid(2, 3)), layer.proj.bias.expand(1, 6, -1))


@pytest.mark.parametrize("name", ["rala", "rala_softmax"])
def test_mistakes_are_told(name):
    with pytest.raises(LinsightError, match="divisible by 4, not 6"):
        create_attention(name, 12, 2)
    layer = create_attention(name, 16, 2, projections="qkv")
    with pytest.raises(LinsightError, match="projections='qkvx'"):
        layer(torch.randn(1, 6, 16), Grid(2, 3))


def test_a_late_stage_sees_all_keys_where_others_are_reduced():
    """A host's reduction is for mechanisms that take reduced keys."""
    stages = [(8, 1, 1, 2.0, 4), (16, 1, 2, 2.0, 2), (16, 1, 2, 2.0, 2), (16, 1, 2, 2.0, 1)]
    plan = "rala,rala_softmax,softmax,rala_softmax"
    model = linsight.create_model("pvt_tiny", attention=plan, stages=stages, img_size=64, num_classes=3)
    layers = [module for module in model.modules() if isinstance(module, linsight.attention.Attention)]
    assert [layer.reduction is not None for layer in layers] == [False, False, True, False]
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 3)
