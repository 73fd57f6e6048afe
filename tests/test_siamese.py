"""SiameseNorm in the ViT host: two residual streams that share every branch, with any mechanism."""

import copy
import math
import pickle

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from torch import nn

import linsight
from linsight.attention import list_attentions
from linsight.errors import LinsightError, UnknownNameError
from linsight.models.parts.siamese import Junction, Merge, Pair

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
MEAN = {"class_token": False, "global_pool": "avg"}
LAYERS = [entry for entry in list_attentions() if entry.kind != "block"]
# Streams that widen once.
STEPS = [(16, 1), (32, 2)]


def siamese(attention="inline", **arguments):
    model = linsight.create_model("vit_tiny", attention=attention, **{**SMALL, "norm": "siamese", **arguments})
    for name, parameter in model.named_parameters():  # so that no norm is as good as another
        if "norm" in name:
            nn.init.normal_(parameter, float(name.endswith("weight")), 0.2)
    return model.eval()


def test_the_streams_of_a_block():
    """Scaled by the place of the block, which it keeps where others are dropped."""
    torch.manual_seed(0)
    junction = Junction(nn.LayerNorm(4), nn.LayerNorm(4), 5).double()
    nn.init.normal_(junction.norm_x.weight)
    nn.init.normal_(junction.norm_y.weight)
    pair, seen = Pair(*torch.randn(2, 3, 5, 4, dtype=torch.float64)), []
    out = junction(pair, lambda z: seen.append(z) or z.sin())
    x, (z,) = junction.norm_x(pair.x), seen
    torch.testing.assert_close(z, x + junction.norm_y(pair.y))
    torch.testing.assert_close(out.x, x + z.sin() / math.sqrt(12))
    torch.testing.assert_close(out.y, pair.y + z.sin())
    model = siamese()
    model.blocks = model.blocks[1:]
    assert [block.pair2.scale for block in model.blocks] == [math.sqrt(4), math.sqrt(6)]


CPE = {**MEAN, "fc_norm": False, "cpe": True, "pos_embed": "none"}


@pytest.mark.parametrize("arguments", [{}, CPE], ids=["class token", "cpe"])
def test_without_the_norms_of_x_it_is_pre_norm(arguments):
    """The paper's relation, with position encodings between blocks too; a norm of a normed tensor changes nothing."""
    model = siamese(**arguments).double()
    plain = linsight.create_model("vit_tiny", attention="inline", **SMALL, **arguments).double().eval()
    state = model.state_dict()
    plain.load_state_dict({key: value for key, value in state.items() if key in plain.state_dict()})
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.zeros_(module.bias)
            nn.init.constant_(module.weight, 0.0 if name.endswith("norm_x") else 1.0)
    for module in plain.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    x = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", LAYERS, ids=lambda entry: entry.name)
def test_any_mechanism(entry):
    model = siamese(entry.name, **({} if entry.capabilities.prefix else MEAN)).train()
    model(torch.randn(2, 3, 24, 40)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_cannot_be_two_streams():
    for entry in list_attentions():
        if entry.kind == "block":
            with pytest.raises(LinsightError, match=r"residual stream of its own: pass norm='pre'"):
                siamese(entry.name, **MEAN)
    with pytest.raises(UnknownNameError, match="did you mean 'siamese'"):
        siamese(norm="siames")
    with pytest.raises(LinsightError, match="final_norm=True"):
        siamese(final_norm=False)
    with pytest.raises(LinsightError, match="pretrained=False"):
        linsight.create_model("deit_tiny_patch16_224", norm="siamese", pretrained=True)


def test_a_path_is_dropped_for_both_streams():
    """One draw for each branch, so what reaches the streams is the same."""
    model = siamese(drop_path_rate=0.5, **MEAN).train()
    block, draws, added = model.blocks[2], [], []
    block.drop_path1.register_forward_hook(lambda module, args, out: draws.append(out))
    block.pair1.register_forward_hook(
        lambda module, args, out: added.append(((out.x - module.norm_x(args[0].x)) * module.scale, out.y - args[0].y))
    )
    model(torch.randn(16, 3, 32, 32))
    (draw,), ((x, y),) = draws, added
    dropped = (draw == 0).flatten(1).all(1)
    assert 0 < dropped.sum() < 16
    torch.testing.assert_close(x, draw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, draw, rtol=1e-4, atol=1e-5)


def test_features_are_merged():
    model, x = siamese(), torch.randn(2, 3, 64, 48)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(map_.shape) for map_ in maps] == [(2, 32, 8, 6)] * 3
    streams = []
    model.blocks[1].register_forward_hook(lambda module, args, out: streams.append(out))
    (tokens,) = model.forward_intermediates(x, indices=[1], norm=True, output_fmt="NLC", intermediates_only=True)
    merged = model.norm_pair.norm_x(streams[0].x) + model.norm_pair.norm_y(streams[0].y)
    torch.testing.assert_close(tokens, model.norm(merged)[:, 1:])
    model.prune_intermediate_layers([0])
    assert torch.equal(model.forward_intermediates(x, indices=[0], intermediates_only=True)[0], maps[0])


def test_features_of_a_name_of_timm():
    """Mean pooling, whose last norm is behind the pool, and timm's wrapper, which drops it."""
    arguments = {**SMALL, **MEAN, "norm": "siamese", "cpe": True}
    model = linsight.create_model("deit_tiny_patch16_224", attention="inline", **arguments)
    assert isinstance(model.norm, nn.Identity) and isinstance(model.norm_pair, Merge)
    assert model(torch.randn(1, 3, 40, 24)).shape == (1, 7)
    model = linsight.create_model(
        "deit_tiny_patch16_224", attention="inline", features_only=True, out_indices=[0, 1], **arguments
    )
    assert [tuple(map_.shape) for map_ in model(torch.randn(1, 3, 40, 24))] == [(1, 32, 5, 3)] * 2


def test_with_a_distillation_token():
    """Its head reads the merged tokens too; at evaluation the two heads are averaged."""
    name, x = "deit_tiny_distilled_patch16_224", torch.randn(2, 3, 40, 24)
    model = linsight.create_model(name, attention="inline", norm="siamese", **SMALL)
    heads = model.head, model.head_dist
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 2 + 5 * 3, 32)
    torch.testing.assert_close(model.eval()(x), (heads[0](tokens[:, 0]) + heads[1](tokens[:, 1])) / 2)
    assert {"pos_embed", "cls_token", "dist_token"} <= model.no_weight_decay()
    theirs = timm.create_model(name, **SMALL).eval()
    ours = linsight.create_model(name, **SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("steps", [None, STEPS], ids=["plain", "steps"])
def test_checkpointing_copies_and_groups(steps):
    model, x = siamese(steps=steps), torch.randn(2, 3, 24, 40)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    groups = group_parameters(model, model.group_matcher())
    assert sorted(name for names in groups.values() for name in names) == sorted(n for n, _ in model.named_parameters())
    assert any("norm_pair.norm_x.weight" in names and "norm.weight" in names for names in groups.values())


@pytest.mark.full
@pytest.mark.timeout(300)
def test_compiled_and_exported():
    """Both designs of the stream in one graph; of any size when exported."""
    torch._dynamo.reset()
    model = siamese(steps=[(16, 1), (32, 1)], cpe=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 40, 24),), dynamic_shapes=(dims,)).module()
        for size in ((32, 32), (33, 17)):
            x = torch.randn(3, 3, *size)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_branches_are_not_rounded_away(dtype):
    """In half precision y sums all branches: 64 of 1e-3, which a y of half precision would not see beside 4."""
    pair = Pair.of(torch.full((1, 1, 4), 4.0, dtype=dtype))
    for i in range(64):
        junction = Junction(nn.LayerNorm(4, dtype=dtype), nn.LayerNorm(4, dtype=dtype), i)
        pair = junction(pair, lambda z: torch.full_like(z, 1e-3))
    assert pair.x.dtype == dtype and pair.y.dtype == torch.float32
    torch.testing.assert_close(pair.y, torch.full((1, 1, 4), 4.064), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """A model of half precision and autocast, without a position table that would make the first y float32."""
    arguments = {**MEAN, "pos_embed": "none", "depth": 6, "steps": STEPS}
    model, x = siamese(**arguments), torch.randn(4, 3, 32, 32)
    exact, seen = model(x), []
    model.blocks[2].register_forward_hook(lambda module, args, out: seen.append(out.y.dtype))
    with torch.autocast("cpu", dtype):
        out = model(x)
    bound = 32 * torch.finfo(dtype).eps * exact.abs().max()
    assert (out - exact).abs().max() < bound
    out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and (out - exact).abs().max() < bound
    assert seen == [torch.float32] * 2


def test_another_size_for_good():
    model = siamese()
    model.set_input_size((48, 64))
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 7)
