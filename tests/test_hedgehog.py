"""Hedgehog against its kernel written out, for every feature map; its keys, its start, and what it can't."""

import itertools

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import cast, close, random_tokens

F64 = torch.float64
MAPS = ("softmax", "softmax_parts", "exp_parts", "exp")


def make_core(feature_map="softmax", dim=16, heads=2, **options):
    core = create_core("hedgehog", dim, heads, feature_map=feature_map, **options).double()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return core


def phi(mapping, kind, x, head):
    """The features of one vector."""
    if kind == "softmax":
        y = mapping.layer.weight @ x + mapping.layer.bias
        return torch.cat([2 * y, -2 * y]).softmax(0)
    y = sum(x[i] * mapping.heads[head, i] for i in range(len(x)))
    if kind == "softmax_parts":
        return torch.cat([y.softmax(0), (-y).softmax(0)])
    if kind == "exp_parts":
        return torch.cat([(y - y.max()).exp(), (y.min() - y).exp()])
    return torch.cat([y.exp(), (-y).exp()])


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("dropping", [False, True])
def test_core_is_its_kernel(kind, dropping):
    core, grid = make_core(kind, features=0 if kind == "softmax" else 5), Grid(2, 3, 1)
    keep = torch.arange(7)[None] % 3 != 1 if dropping else None
    tokens = random_tokens(core, 1, grid, keep=keep)
    out = core(tokens, Layout(grid))
    kept = [j for j in range(7) if keep is None or keep[0, j]]
    for h in range(2):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        for i in range(7):
            weights = torch.stack([phi(core.map_q, kind, q[i], h) @ phi(core.map_k, kind, k[j], h) for j in kept])
            close(out[0, i, h], weights @ v[kept] / weights.sum())


def test_maps_differ():
    """Weights of one map are not those of another: they weight keys differently."""
    grid, found = Grid(3, 4), []
    for kind in MAPS[1:]:
        torch.manual_seed(0)
        core = make_core(kind)
        found.append(core(random_tokens(core, 1, grid), Layout(grid)))
    assert all((a - b).abs().max() > 1e-2 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_exponents_neither_overflow_nor_vanish(dtype):
    """|y| of 300: exp overflows in float32, too, and features relative to one maximum of a head would all be 0."""
    core, grid = create_core("hedgehog", 16, 2, feature_map="exp"), Grid(4, 4)
    tokens = random_tokens(core, 1, grid)
    tokens = cast(tokens._replace(q=tokens.q * 100, k=tokens.k * 100), dtype)
    exact = core.double()(cast(tokens, F64), Layout(grid))
    ours = core.to(dtype)(tokens, Layout(grid)).double()
    assert exact.abs().amin() > 0
    assert (ours - exact).abs().max() <= 1e-3 * exact.abs().max()


@pytest.mark.parametrize("kind", MAPS)
def test_it_starts_as_the_identity(kind):
    core = create_core("hedgehog", 16, 2, feature_map=kind)
    x = torch.randn(1, 3, 2, 8)
    close(core.map_q.exponents(x), torch.cat([x, -x], dim=-1), 1e-6)


def test_published_keys():
    projections = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    shared = {f"feature_map_{name}.layer.{part}" for name in "qk" for part in ("weight", "bias")}
    assert set(linsight.export_published(create_attention("hedgehog", 16, 2))) == projections | shared
    layer = create_attention("hedgehog", 16, 2, feature_map="exp_parts", features=3)
    state = linsight.export_published(layer)
    assert set(state) == projections | {f"feature_map_{name}.mlp.layer" for name in "qk"}
    assert state["feature_map_q.mlp.layer"].shape == (2, 8, 3)
    state["feature_map_k.mlp.layer"] += 1
    linsight.load_published(layer, state)
    assert torch.equal(layer.core.map_k.heads, state["feature_map_k.mlp.layer"])


def test_what_there_is_not():
    with pytest.raises(CapabilityError, match="no causal form, the others have"):
        create_core("hedgehog", 16, 2, feature_map="exp", causal=True)
    for features, kind in ((-1, "exp"), (4, "softmax")):
        with pytest.raises(LinsightError, match=f"features={features} of 'hedgehog'"):
            create_core("hedgehog", 16, 2, feature_map=kind, features=features)
