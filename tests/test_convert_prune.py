"""DiMaP against its definition, weight by weight; masks that training keeps; reports; the command."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from export.small_runs import write_run
from linsight import create_model, load_run
from linsight.convert.prune import importance, kind_of, make_permanent, prune
from linsight.errors import LinsightError, UnknownNameError
from linsight.models.parts.stages import StageSize

SMALL = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 32, "num_classes": 3}
STAGES = (StageSize(16, 1, 1, mlp_ratio=2, reduction=2), StageSize(32, 1, 2, mlp_ratio=2, reduction=1))


def swin(**sizes):
    model = timm.create_model("swin_tiny_patch4_window7_224", **{**SMALL, **sizes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def define(weight):
    """The importance of each weight, as the publication defines it."""
    squares = weight.double().square().flatten()
    left = [squares[squares >= square].sum() for square in squares]
    return [float(square / total) if total else 0.0 for square, total in zip(squares, left, strict=True)]


def named(model):
    found = {}
    for name, module in model.named_modules():
        kind = kind_of(name, module)
        if kind:
            found.setdefault(kind, {})[name] = module
    return found


def test_importance_is_its_definition():
    weight = torch.randn(5, 7)
    weight[0, :3] = torch.tensor([0.5, -0.5, 0.5])  # equal in magnitude
    weight[1, :2] = 0
    found = importance(weight)
    torch.testing.assert_close(found.flatten(), torch.tensor(define(weight), dtype=torch.float64))
    assert found.max() == 1 == found.flatten()[weight.abs().argmax()]
    assert found[0, 0] == found[0, 1] == found[0, 2] and found[1, 0] == 0
    assert not importance(torch.zeros(2, 2)).any()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_least_important_of_all_layers_of_a_kind_are_pruned(ratio):
    model = swin(mlp_ratio=1, embed_dim=8)
    before = copy.deepcopy(model)
    report = prune(model, ratio)
    for row in report.kinds:
        layers = named(before)[row.kind]
        scores = [(score, name, i) for name, m in layers.items() for i, score in enumerate(define(m.weight.detach()))]
        gone = {(name, i) for _, name, i in sorted(scores, key=lambda one: one[0])[: round(ratio * len(scores))]}
        assert row.zeros == len(gone) and row.layers == len(layers) and row.weights == len(scores)
        for name, layer in layers.items():
            ours = model.get_submodule(name).weight.flatten()
            zeros = {(name, i) for i in range(len(ours)) if ours[i] == 0}
            assert zeros == {one for one in gone if one[0] == name}
            assert torch.equal(ours[ours != 0], layer.weight.flatten()[ours != 0])


def test_kinds_of_layers():
    found = named(create_model("pvt_v2_b0", device="meta"))
    assert set(found) == {"qkv", "proj", "mlp", "aux"}
    assert {name.rpartition(".")[2] for name in found["qkv"]} == {"q", "kv"}
    assert {name.rpartition(".")[2] for name in found["mlp"]} == {"fc1", "fc2"}  # not the depthwise convolution
    assert all("patch_embed" in name or "downsample" in name for name in found["aux"])
    for name, kinds in {
        "swinv2_tiny_window8_256": "qkv proj mlp aux",
        "vit_tiny_patch16_224": "qkv proj mlp aux",
    }.items():
        with torch.device("meta"):
            assert set(named(timm.create_model(name))) == set(kinds.split())


def test_what_is_not_asked_for_is_left():
    model = swin()
    before = copy.deepcopy(model.state_dict())
    prune(model, 0.5, modules=["proj"])
    make_permanent(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in named(model)["proj"]}
    prune(model, 0.5, modules="aux")
    assert int((model.patch_embed.proj.weight == 0).sum()) > 0


def test_nothing_of_a_ratio_of_0():
    model = swin()
    before = model.state_dict()
    report = prune(model, 0)
    assert all(row.zeros == 0 for row in report.kinds) and report.macs_left == 1
    assert model.state_dict().keys() == before.keys() and make_permanent(model) == []


def test_near_1_no_layer_is_empty():
    model = swin()
    prune(model, 0.99)
    for layers in (layers for kind, layers in named(model).items() if kind != "aux"):
        for layer in layers.values():
            assert layer.weight.abs().amax() > 0
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_of_equal_weights_as_many_as_asked_for():
    model = swin()
    for layers in named(model).values():
        for layer in layers.values():
            nn.init.constant_(layer.weight, 0.5)
    report = prune(model, 0.3)
    assert [row.zeros for row in report.kinds] == [round(0.3 * row.weights) for row in report.kinds]


def test_training_keeps_the_zeros():
    model = swin()
    prune(model, 0.6)
    zeros = {name: layer.weight == 0 for layers in named(model).values() for name, layer in layers.items()}
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    before = {name: layer.weight.clone() for layers in named(model).values() for name, layer in layers.items()}
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimiser.step()
    for name, was in zeros.items():
        weight = model.get_submodule(name).weight
        assert not weight[was].any() and (weight != before[name])[~was].any()


def test_masks_are_copied_saved_and_made_permanent():
    model = swin()
    prune(model, 0.6)
    images = torch.randn(1, 3, 32, 32)
    twin, other = copy.deepcopy(model), swin()
    prune(other, 0.2)
    other.load_state_dict(model.state_dict())
    expected = model.eval()(images)
    for again in (twin, other):
        assert torch.equal(again.eval()(images), expected)
    names = make_permanent(twin)
    assert torch.equal(twin(images), expected) and torch.equal(model(images), expected)
    plain = swin()
    plain.load_state_dict(twin.state_dict())
    assert torch.equal(plain.eval()(images), expected)
    assert set(names) == {name for kind, layers in named(plain).items() if kind != "aux" for name in layers}


def test_a_pruned_model_is_pruned_further():
    twice = swin()
    prune(twice, 0.3)
    zeros = {name: layer.weight == 0 for layers in named(twice).values() for name, layer in layers.items()}
    report = prune(twice, 0.6)
    assert [row.zeros for row in report.kinds] == [round(0.6 * row.weights) for row in report.kinds]
    assert all(not twice.get_submodule(name).weight[was].any() for name, was in zeros.items())
    assert all(row.sparsity == pytest.approx(0.6, abs=1e-2) for row in prune(twice, 0.1).kinds)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("swinv2_tiny_window8_256", **{**SMALL, "window_size": 4}),
        lambda: timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)),
        lambda: create_model("swin_tiny", attention="linear", **SMALL),
        lambda: create_model("pvt_tiny", stages=STAGES),
    ],
    ids=["timm_swinv2", "timm_pvt_v2", "swin", "pvt"],
)
def test_hosts(make):
    model = make()
    report = prune(model, 0.5, input_size=(3, 32, 32))
    assert [row.kind for row in report.kinds] == ["qkv", "proj", "mlp"] and 0.5 < report.macs_left < 1
    assert "multiply-adds left" in str(report) and "50.0%" in str(report)
    model(torch.randn(1, 3, 32, 32)).sum().backward()


def test_multiply_adds_are_counted_by_hand():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    nn.init.normal_(model.blocks[0].mlp.fc1.weight)
    report = prune(model, 0.5, modules=["mlp"], input_size=(3, 32, 32))
    tokens, width = 5, 8
    attention = 2 * tokens * tokens * width
    total = tokens * width * width * (4 + 8) + attention + 4 * 3 * 256 * width + 3 * width
    zeros = int((model.blocks[0].mlp.fc1.weight == 0).sum() + (model.blocks[0].mlp.fc2.weight == 0).sum())
    assert zeros == report.kinds[0].zeros == 8 * width * width // 2
    assert report.macs == total and report.saved == tokens * zeros
    del model.default_cfg
    assert prune(model, 0.5, modules=["mlp"]).macs_left is None


def test_bad_input():
    model = swin()
    for ratio in (1, -0.1, float("nan")):
        with pytest.raises(LinsightError, match="from 0 to below 1"):
            prune(model, ratio)
    with pytest.raises(UnknownNameError, match="kind of layers to prune 'mpl'"):
        prune(model, 0.5, modules=["mpl"])
    with pytest.raises(LinsightError, match="no layers of the kind 'qkv'"):
        prune(nn.Sequential(nn.Linear(2, 2)), 0.5)
    nn.utils.parametrizations.weight_norm(model.layers[0].blocks[0].mlp.fc1)
    with pytest.raises(LinsightError, match="parametrization of its own"):
        prune(model, 0.5)
    model = swin()
    model.layers[1].blocks[1].attn.qkv.weight.data[0, 0] = float("nan")
    with pytest.raises(LinsightError, match="no finite numbers"):
        prune(model, 0.5)
    assert make_permanent(model) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def test_the_command_writes_weights_that_are_a_run(run, linsight, tmp_path):
    out = tmp_path / "pruned.safetensors"
    code, told, error = linsight("prune", run, "--ratio", "0.5", "--out", out, "--json")
    assert (code, error) == (0, "")
    found, before, after = json.loads(told), load_file(run / "best.safetensors"), load_file(out)
    assert [row["sparsity"] for row in found["kinds"]] == [0.5] * 3 and 0.4 < found["macs_left"] < 1
    assert after.keys() == before.keys()
    zeros = sum(int((tensor == 0).sum()) for name, tensor in after.items() if "blocks" in name)
    assert zeros >= sum(row["zeros"] for row in found["kinds"])
    assert load_run(out).classes == load_run(run).classes
    code, told, error = linsight("prune", run, "--ratio", "0.5", "--out", out, "--modules", "mlp")
    assert (code, error) == (0, "") and "mlp" in told and "qkv" not in told.replace("pruned.safetensors", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ratio", "1"], "from 0 to below 1"),
        (["--ratio", "0.5", "--modules", "mpl"], "did you mean 'mlp'"),
        (["--ratio", "0.5", "--out", "pruned.pth"], "must end with .safetensors"),
        (["--ratio", "0.5", "--out", "nowhere/pruned.safetensors"], "there is no folder"),
        (["--ratio", "0.5", "--checkpoint", "weights.pth"], "unknown model"),
        (["--out", "pruned.safetensors"], "--ratio"),
    ],
)
def test_bad_input_of_the_command(run, linsight, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    given = options if "--out" in options else [*options, "--out", "pruned.safetensors"]
    code, out, error = linsight("prune", run, *given)
    assert (code, out) == (2, "") and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_pruned_is_not_written_over(run, linsight):
    weights = run / "best.safetensors"
    before = weights.read_bytes()
    code, _, error = linsight("prune", run, "--ratio", "0.5", "--out", weights)
    assert code == 2 and "give another name" in error and weights.read_bytes() == before
