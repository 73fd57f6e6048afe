"""The RAVLT host: the rotation that its stages share, the scales of its branches, its widening head."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import linsight
from linsight.errors import CheckpointError, LinsightError
from streaming.hosts import PLAIN, close, image, small, whole
from test_hosts import SMALL, build

PLANS = {
    "ravlt_t": "rala,rala:1/inline,rala_softmax,rala_softmax",
    "nala_xt": "nalaformer,nalaformer:1/inline,nalaformer_softmax,nalaformer_softmax",
}
hosts = pytest.mark.parametrize("host", PLANS)


def angles(model):
    return {key: tensor for key, tensor in model.state_dict().items() if key.endswith(".angle")}


@hosts
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stage_has_one_rotation_as_published(host, wrapped):
    """Loaded into every block that rotates, and written once."""
    plan = PLANS[host].replace(":1/inline", "")
    model = build(host, plan)
    state = linsight.export_published(model)
    assert [key for key in state if "angle" in key] == [f"layers.{i}.RoPE.angle" for i in range(4)]
    for i in range(4):
        state[f"layers.{i}.RoPE.angle"].fill_(i + 0.5)
    if wrapped:
        state = {f"backbone.{key}": tensor for key, tensor in state.items()} | {"loss.scale": torch.ones(())}
    report = linsight.load_published(model, state)
    assert not (report.kept or report.mismatched or len(report.dropped) > wrapped)
    found = angles(model)
    assert len(found) == 5 and all(tensor.eq(int(key.split(".")[1]) + 0.5).all() for key, tensor in found.items())
    again = linsight.export_published(model)
    assert all(again[f"layers.{i}.RoPE.angle"].eq(i + 0.5).all() for i in range(4))
    next(iter(found.values())).add_(1)  # the only one of its stage
    linsight.export_published(model)
    model.stages[1].blocks[1].attn.core.angle.add_(1)
    with pytest.raises(
        CheckpointError, match=r"'layers.1.RoPE.angle' is one tensor as published, but 'stages.1.blocks.1"
    ):
        linsight.export_published(model)


@hosts
def test_blocks_that_do_not_rotate_have_none(host):
    model = build(host, PLANS[host])
    state = linsight.export_published(model)
    assert len([key for key in state if "RoPE" in key]) == 4 and len(angles(model)) == 4
    linsight.load_published(model, state)
    plain = build(host, "inline")
    assert not any("RoPE" in key for key in linsight.export_published(plain))
    del state["layers.2.RoPE.angle"]
    with pytest.raises(CheckpointError, match=r"stages\.2\.blocks\.0\.attn\.core\.angle"):
        linsight.load_published(model, state)


def test_scales_begin_as_they_are_told():
    model = build("ravlt_t", init_values=[1.0, 1.0, 1e-6, 0.5])
    for stage, value in zip(model.stages, (1.0, 1.0, 1e-6, 0.5), strict=True):
        for block in stage.blocks:
            assert block.gamma_1.eq(value).all() and block.gamma_2.eq(value).all()
    with pytest.raises(LinsightError, match="init_values= lists 2 values, but there are 4 stages"):
        build("ravlt_t", init_values=[1.0, 1.0])
    with pytest.raises(LinsightError, match=r"init_values=0\.1 has no effect"):
        build("ravlt_t", "weightformer", init_values=0.1)


@hosts
def test_the_block_is_the_published_one(host):
    """Each branch, times its scale, is added to what the encoding gave."""
    block = build(host, PLANS[host]).stages[0].blocks[0].eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    grid, x = linsight.Grid(3, 5), torch.randn(2, 15, 8)

    def encoded(conv, x):
        canvas = x.transpose(1, 2).unflatten(2, (3, 5))
        return x + F.conv2d(canvas, conv.weight, conv.bias, padding=1, groups=x.shape[2]).flatten(2).transpose(1, 2)

    def normed(norm, x):
        return F.layer_norm(x, (8,), norm.weight, norm.bias, 1e-6)

    y = encoded(block.cpe, x)
    y = y + block.gamma_1 * block.attn(normed(block.norm1, y), grid)
    if host == "nala_xt":
        y = encoded(block.cpe2, y)
    hidden = encoded(block.mlp.dwc, F.gelu(block.mlp.fc1(normed(block.norm2, y))))
    torch.testing.assert_close(block(x, grid), y + block.gamma_2 * block.mlp.fc2(hidden))


@hosts
def test_the_head_widens_before_it_pools(host):
    model = build(host).eval()
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    assert model.num_features == features.shape[1] == 16 and model.head_hidden_size == 24
    proj, norm = model.head.proj, model.head.norm
    nn.init.normal_(norm.running_mean)
    wide = F.conv2d(features, proj.weight[..., None, None], proj.bias)
    wide = F.silu(F.batch_norm(wide, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), wide.mean((2, 3)))
    torch.testing.assert_close(model(x), model.head.fc(wide.mean((2, 3))))
    assert not any(key.startswith("model.head.") for key in build(host, features_only=True).state_dict())


@hosts
def test_streams_with_the_head(host):
    """Widened tokens are averaged, and the map is that before them."""
    model, picture = small(host, "rala" if host == "ravlt_t" else "nalaformer"), image(131, 97)
    spatial, features, logits = whole(model, picture)
    for output, expected in (("map", spatial), ("features", features), ("logits", logits)):
        found = linsight.stream(model, picture, tile=48, output=output, **PLAIN)
        close(found.flatten(0, 1) if output == "map" else found, expected)


@hosts
def test_published_convolutions_of_one_place(host):
    """RAVLT has 1x1 convolutions where NaLaFormer has linear layers; the classifier is one in both."""
    state, ones = linsight.export_published(build(host)), (1, 1) if host == "ravlt_t" else ()
    width = SMALL[host]["projection"]
    shapes = {"ffn.fc1": (16, 8, *ones), "ffn.fc2": (8, 16, *ones)}
    assert {key: tuple(state[f"layers.0.blocks.0.{key}.weight"].shape) for key in shapes} == shapes
    assert state["layers.0.blocks.0.gamma_1"].shape == (1, 8, 1, 1)
    assert state["proj.weight"].shape == (width, 16, *ones) and state["head.weight"].shape == (7, width, 1, 1)
