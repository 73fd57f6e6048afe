"""StepsNet: sub-networks of growing width on slices of the channels, in ViT, Swin and ResNet."""

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import linsight
from linsight.attention import list_attentions
from linsight.bench.counting import count_macs, count_parameters
from linsight.errors import LinsightError
from linsight.models.hosts.steps_resnet import StepsResNet

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
STEPS = [(16, 1), (24, 2), (32, 1)]
SWIN = {"img_size": 64, "embed_dim": 8, "depths": (2, 4), "num_heads": (1, 4), "window_size": 4, "num_classes": 5}
SWIN_STEPS = [[(8, 2)], [(4, 1), (8, 1), (16, 2)]]
RESNET = [[(16, 1)], [(24, 1)], [(8, 1), (12, 2), (32, 1)], [(8, 1), (12, 1), (40, 0)]]
MEAN = {"class_token": False, "global_pool": "avg"}
MECHANISMS = list_attentions()


def vit(attention="inline", **arguments):
    return linsight.create_model("vit_tiny", attention=attention, **{**VIT, "steps": STEPS, **arguments}).eval()


def swin(attention="inline", **arguments):
    return linsight.create_model("swin_tiny", attention=attention, **{**SWIN, "steps": SWIN_STEPS, **arguments}).eval()


def resnet(block="basic", **arguments):
    return StepsResNet(block, **{"stages": RESNET, "num_classes": 5, **arguments}).eval()


HOSTS = {"vit": vit, "swin": swin, "resnet": resnet}
hosts = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)


def step_blocks(model):
    """Those behind the stem, or behind the first blocks of a ResNet's stages."""
    if isinstance(model, StepsResNet):
        stages = [model.layer1, model.layer2, model.layer3, model.layer4]
        return [b for s in stages for m in s[1:] for b in m.modules() if isinstance(b, BasicBlock | Bottleneck)]
    return [b for stage in getattr(model, "layers", [model]) for b in stage.blocks]


@pytest.mark.parametrize(
    ("make", "steps", "depth"),
    [
        (vit, {"steps": [(32, 3)]}, {"steps": None}),
        (lambda **arguments: vit(norm="siamese", **arguments), {"steps": [(32, 3)]}, {"steps": None}),
        (swin, {"steps": [[(8, 2)], [(16, 4)]]}, {"steps": None}),
    ],
    ids=["vit", "siamese", "swin"],
)
def test_one_step_is_the_host(make, steps, depth):
    """Bit for bit, with the same keys."""
    model, plain = make(**steps), make(**depth)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(("block", "name"), [("basic", "resnet18"), ("bottleneck", "resnet50")])
def test_one_step_is_timms_resnet(block, name):
    theirs = timm.create_model(name, num_classes=5).eval()
    depths = [len(layer) - 1 for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)]
    stages = [[(width, depth)] for width, depth in zip((64, 128, 256, 512), depths, strict=True)]
    ours = resnet(block, stages=stages)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 48)
    assert torch.equal(ours(x), theirs(x))


@hosts
def test_steps_of_the_identity_are_the_identity(make):
    model = make()
    for block in step_blocks(model):
        for name, module in block.named_children():
            if name in ("attn", "mlp", "conv2", "bn2"):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 64, 40)
    if isinstance(model, StepsResNet):
        x = torch.rand(2, 32, 6, 5)  # blocks end in a ReLU
        assert torch.equal(model.layer3[1:](x), x)
    elif hasattr(model, "layers"):
        x = model.layers[1].downsample(model.patch_embed(x))
        model.layers[1].downsample = nn.Identity()
        assert torch.equal(model.layers[1](x), x)
    else:
        embedded = model._embed(x, None, False)[0]
        assert torch.equal(model.forward_features(x), model.norm(embedded))


def test_each_step_gets_the_last_output_and_a_fresh_slice():
    """y_i = F_i([y_(i-1), x_i]), the processed channels first; written out for the ViT, tokens of all kinds alike."""
    model, images = vit(cpe=True), torch.randn(2, 3, 40, 24)
    x, grid = model._embed(images, None, False)
    y = model.blocks[0](x[..., :16], grid)
    y = model.blocks[2](model.blocks[1](torch.cat([y, x[..., 16:24]], -1), grid), grid)
    y = model.blocks[3](torch.cat([y, x[..., 24:]], -1), grid)
    torch.testing.assert_close(model.forward_features(images), model.norm(y))
    first, second, *_ = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert first.shape == (2, 15, 32)
    assert torch.equal(first[..., 16:], x[:, 1:, 16:]) and torch.equal(second[..., 24:], x[:, 1:, 24:])


def test_each_step_of_a_resnet():
    model = resnet()
    x = torch.randn(2, 32, 6, 5)
    first, step, wide, whole = model.layer3
    y = step[0](x[:, :8])
    y = wide[1](wide[0](torch.cat([y, x[:, 8:12]], 1)))
    y = whole(torch.cat([y, x[:, 12:]], 1))
    torch.testing.assert_close(model.layer3[1:](x), y)
    assert first.conv1.weight.shape == (32, 24, 3, 3)
    # The last slice of a stage whose last step has no block is seen behind the stage only.
    assert torch.equal(model.layer4[1:](torch.ones(1, 40, 2, 2))[:, 12:], torch.ones(1, 28, 2, 2))


@pytest.mark.parametrize("entry", MECHANISMS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_any_mechanism(make, entry):
    """In steps of its own heads' width, blocks that are mechanisms too."""
    model = make(entry.name, **(MEAN if make is vit and not entry.capabilities.prefix else {})).train()
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_heads_and_shifts():
    assert [block.attn.num_heads for block in vit().blocks] == [2, 3, 3, 4]
    blocks = swin("softmax", window_size=2).layers[1].blocks
    assert [block.attn.num_heads for block in blocks] == [1, 2, 4, 4]
    assert [block.shift for block in blocks] == [(0, 0), (1, 1)] * 2


@hosts
def test_depth_is_counted_over_all_blocks(make):
    """Paths are dropped by a block's place in the model."""
    model = make(drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    count = sum(isinstance(m, BasicBlock) for m in model.modules()) or len(step_blocks(model))
    grid = torch.linspace(0, 0.3, count)[1:]
    wanted = grid if make is resnet else grid.repeat_interleave(2)
    torch.testing.assert_close(torch.tensor(rates), wanted)


@hosts
def test_what_timm_asks(make):
    """Checkpointing with the same gradients, groups of all parameters, heads, features."""
    model, x = make(), torch.randn(2, 3, 64, 96)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    groups = group_parameters(model, model.group_matcher())
    assert sorted(name for names in groups.values() for name in names) == sorted(n for n, _ in model.named_parameters())
    assert all(len({n.partition(".conv1")[0] for n in names if "conv1." in n}) <= 1 for names in groups.values())
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert all(map_.shape[1] == info["num_chs"] for map_, info in zip(maps, model.feature_info, strict=True))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_swin_and_resnet_export():
    """The ViT's steps are exported in the tests of SiameseNorm. Few blocks, because tracing is slow."""
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    shallow = resnet(stages=[[(16, 1)], [(12, 1), (24, 0)], [(32, 0)], [(40, 0)]])
    for model in (swin(depths=(2, 2), steps=[[(8, 2)], [(4, 1), (16, 1)]]), shallow):
        with torch.no_grad():
            program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(dims,)).module()
            x = torch.randn(3, 3, 160, 64)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_swin_of_steps_takes_another_size_for_good():
    model = swin("softmax,inline")
    model.set_input_size((96, 64))
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 5)


# Parameters, billions of multiply-adds, blocks, which all follow from the published steps. (The table has 36 layers
# for the first, so 17 blocks, but its own row has 18.)
RESNETS = {
    "steps_resnet18": (11_689_060, 1.814, 18),
    "steps_resnet34": (21_795_824, 3.663, 34),
    "steps_resnet50": (25_567_176, 4.088, 34),
}
BUDGETS = {
    "steps_deit_tiny": (5.7e6, 1.3, 24),
    "steps_deit_small": (22.1e6, 4.7, 24),
    "steps_deit_base": (86.7e6, 17.9, 24),
    "steps_swin_tiny": (27.8e6, 4.5, 26),
    "steps_swin_small": (49.1e6, 8.8, 38),
    "steps_swin_base": (86.7e6, 15.5, 38),
}


def costs(model):
    return count_parameters(model), count_macs(model, torch.empty(1, 3, 224, 224, device="meta")) / 1e9


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_are_the_published_ones(name):
    model = timm.create_model(name, device="meta").eval()
    params, gmacs, blocks = RESNETS[name]
    assert costs(model) == (params, pytest.approx(gmacs, abs=5e-4))
    assert sum(isinstance(module, BasicBlock | Bottleneck) for module in model.modules()) == blocks
    assert model.layer4[1].width == 64 * (4 if name.endswith("50") else 1)
    assert model.layer4[1][0].conv2.weight.shape[:2] == (64, 64)


@pytest.mark.parametrize("name", BUDGETS)
def test_our_widths_meet_the_published_budgets(name):
    model = timm.create_model(name, device="meta").eval()
    params, gmacs, blocks = BUDGETS[name]
    assert costs(model) == (pytest.approx(params, rel=0.02), pytest.approx(gmacs, rel=0.02))
    assert len(step_blocks(model)) == blocks


def test_a_steps_resnet_by_name():
    model = linsight.create_model("steps_resnet18", num_classes=3, in_chans=1, features_only=True, out_indices=(1, 4))
    assert [tuple(map_.shape) for map_ in model(torch.randn(1, 1, 64, 96))] == [(1, 64, 16, 24), (1, 512, 2, 3)]
    assert timm.create_model("steps_resnet18", num_classes=3, img_size=96)(torch.randn(2, 3, 70, 50)).shape == (2, 3)
    with pytest.raises(LinsightError, match="takes no attention mechanism"):
        linsight.create_model("steps_resnet18", attention="inline")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vit(steps=[]), "pairs of a width and a number of blocks"),
        (lambda: vit(steps=5), "pairs of a width and a number of blocks"),
        (lambda: vit(steps=[16, 32]), "pairs of a width and a number of blocks"),
        (lambda: vit(steps=[(16, -1), (32, 2)]), "pairs of a width and a number of blocks"),
        (lambda: vit(steps=[(32, 1), (16, 1)]), "widths must grow"),
        (lambda: vit(steps=[(0, 1), (32, 1)]), "widths must grow"),
        (lambda: vit(steps=[(16, 1), (24, 2)]), "takes all 32 channels, not 24"),
        (lambda: vit(steps=[(12, 1), (32, 2)]), "choose a multiple of 8"),
        (lambda: swin(steps=[[(8, 2)], [(2, 2), (16, 2)]]), "choose a multiple of 4"),
        (lambda: swin(steps=[[(8, 2)], [(8, 4)]]), "takes all 16 channels, not 8"),
        (lambda: resnet(stages=RESNET[:3]), "a ResNet has 4"),
        (lambda: resnet(stages=[[], *RESNET[1:]]), "pairs of a width and a number of blocks"),
        (lambda: resnet(block="basik"), "did you mean 'basic'"),
        (
            lambda: linsight.create_model("vit_tiny_patch16_224", steps=[(64, 2), (192, 4)], pretrained=True),
            "pretrained=False",
        ),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(LinsightError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_name_of_timm():
    model = linsight.create_model(
        "deit_tiny_patch16_224", attention="inline", **{**VIT, "depth": 12}, steps=[[16, 2], [32, 1]]
    )
    assert [block.norm1.normalized_shape[0] for block in model.blocks] == [16, 16, 32]
    assert model(torch.randn(1, 3, 40, 24)).shape == (1, 7)
