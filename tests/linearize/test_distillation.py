"""Layer-wise and end-to-end distillation of converted models, beside plain definitions."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from linsight.convert import (
    Recovery,
    converted_layers,
    distil,
    distil_layers,
    layer_errors,
    linearize,
    load_linearized,
    new_parameters,
    save_linearized,
)
from linsight.convert.recovery import apart, blocks, prediction
from linsight.convert.transfer import implied_weights
from linsight.errors import LinsightError
from linsight.ops import Grid

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 64}


@pytest.fixture
def teacher():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    for key, parameter in model.named_parameters():
        if "norm" not in key:
            nn.init.normal_(parameter, std=0.4 if "qkv" in key else 0.1)
    return model


@pytest.fixture
def batches():
    return [torch.randn(4, 3, 64, 64) for _ in range(3)]


def attended(teacher, images):
    """The inputs of each attention of a teacher, and its outputs."""
    found = []
    handles = [
        block.attn.register_forward_hook(lambda module, args, out: found.append((args[0], out)))
        for block in teacher.blocks
    ]
    with torch.no_grad():
        teacher(images)
    for handle in handles:
        handle.remove()
    return found


def test_the_error_of_a_layer_is_of_its_own_input(teacher, batches):
    student = linearize(teacher, "hedgehog")
    student.blocks[0].mlp.fc1.weight.data.zero_()  # what comes before a layer does not count
    student(batches[0])
    expected = [[], []]
    for images in batches:
        for i, (x, target) in enumerate(attended(teacher, images)):
            ours = student.blocks[i].attn(x).detach()
            expected[i].append(((ours - target).square().mean() / target.var()).sqrt())
    found = layer_errors(teacher, student, batches)
    assert list(found) == ["blocks.0.attn", "blocks.1.attn"]
    for error, own in zip(found.values(), expected, strict=True):
        assert error == pytest.approx(float(torch.stack(own).mean()), rel=1e-4)
    assert max(layer_errors(teacher, linearize(teacher, "softmax"), batches).values()) < 1e-5


def test_layers_learn_what_the_old_ones_gave(teacher, batches):
    student, before = linearize(teacher, "hedgehog"), copy.deepcopy(teacher.state_dict())
    inherited = {key: t.clone() for key, t in student.state_dict().items() if ".mixing." not in key}
    start, told = layer_errors(teacher, student, batches), []
    end = distil_layers(teacher, student, batches, steps=30, report=lambda step, losses: told.append(losses))
    after = layer_errors(teacher, student, batches)
    assert all(after[name] < 0.8 * start[name] for name in start)
    assert len(told) == 30 and told[-1] == end and told[0].keys() == start.keys()
    assert all(torch.equal(tensor, student.state_dict()[key]) for key, tensor in inherited.items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_one_step_is_that_of_adamw_on_the_sum(teacher, batches):
    student = linearize(teacher, "hedgehog")
    twin = copy.deepcopy(student)
    twin(batches[0])
    distil_layers(teacher, student, batches, steps=1, lr=3e-3)
    total = sum(
        (twin.blocks[i].attn(x) - target).square().mean() / target.var()
        for i, (x, target) in enumerate(attended(teacher, batches[0]))
    )
    optimiser = torch.optim.AdamW(new_parameters(twin).values(), 3e-3, weight_decay=0)
    total.backward()
    optimiser.step()
    for key, parameter in new_parameters(student).items():
        torch.testing.assert_close(parameter, twin.get_parameter(key), rtol=1e-3, atol=1e-5)


def test_weights_are_those_that_values_are_averaged_by(teacher, batches):
    student = linearize(teacher, "hedgehog")
    mixing = student.blocks[0].attn.mixing
    q, k, v = (torch.randn(2, 17, 2, 16) for _ in range(3))
    weights = implied_weights(mixing, q, k, torch.randn(2, 17, 32), Grid(4, 4, 1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 17))
    out = torch.einsum("bhmn,bnhd->bmhd", weights, v).flatten(2)
    torch.testing.assert_close(out, mixing(q, k, v, torch.randn(2, 17, 32), Grid(4, 4, 1)), rtol=1e-4, atol=1e-5)
    soft = linearize(teacher, "softmax").blocks[0].attn.mixing
    expected = torch.einsum("bmhd,bnhd->bhmn", q, k).mul(16**-0.5).softmax(-1)
    torch.testing.assert_close(implied_weights(soft, q, k, torch.randn(2, 17, 32), Grid(4, 4, 1)), expected)


def test_mimicry_brings_weights_together(teacher, batches):
    student, told = linearize(teacher, "hedgehog"), []
    distil_layers(teacher, student, batches, steps=25, loss="weights", report=lambda step, losses: told.append(losses))
    assert all(told[-1][name] < told[0][name] - 0.02 for name in told[0])
    with pytest.raises(LinsightError, match="'inline' has negative weights"):
        distil_layers(teacher, linearize(teacher, "inline"), batches, steps=1, loss="weights")


@pytest.mark.parametrize("train", ["all", "new", "lora"])
def test_the_whole_model_learns(teacher, batches, train):
    student = linearize(teacher, "hedgehog")
    before, told = copy.deepcopy(student.state_dict()), []
    how = Recovery(train=train, lr=2e-3, hidden=1.0)
    distil(teacher, student, batches, steps=12, recovery=how, report=lambda step, losses: told.append(losses))
    assert told[-1]["hidden"] < 0.95 * told[0]["hidden"] and told[0].keys() == {"logits", "hidden"}
    after = student.state_dict()
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    new = set(new_parameters(student))
    maps = {f"blocks.{i}.attn.{name}.weight" for i in range(2) for name in ("qkv", "proj")}
    if train == "all":
        assert new | maps < changed and not any("embed" in key for key in changed)
    else:
        assert changed == (new if train == "new" else new | maps)
    assert after.keys() == before.keys() and all(parameter.requires_grad for parameter in student.parameters())
    if train == "lora":
        for key in maps:
            rank = torch.linalg.matrix_rank(after[key] - before[key], rtol=1e-3)
            assert 1 <= rank <= how.rank


def test_the_losses_are_those_that_are_written(teacher, batches):
    student, images = linearize(teacher, "hedgehog"), batches[0]
    labels = torch.tensor([0, 1, 2, 3])

    def task(outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    how = Recovery(logits=0.5, hidden=2.0, task=3.0, temperature=2.0)
    twin = copy.deepcopy(student)
    found = distil(teacher, student, [(images, labels)], steps=1, recovery=how, task=task)
    states = {name: [] for name in ("ours", "theirs")}
    for model, kept in ((twin, states["ours"]), (teacher, states["theirs"])):
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out.detach()))
    ours, theirs = twin(images).detach(), teacher(images).detach()
    p, q = (theirs / 2).softmax(-1), (ours / 2).softmax(-1)
    assert found["logits"] == pytest.approx(float(0.5 * 4 * (p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    errors = [((a - b).square().mean() / b.var()) for a, b in zip(states["ours"], states["theirs"], strict=True)]
    assert found["hidden"] == pytest.approx(float(2 * sum(errors) / 2), rel=1e-3)
    assert found["task"] == pytest.approx(float(3 * F.cross_entropy(ours, labels)), rel=1e-4)


def test_distances_of_predictions():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    assert float(apart(a, b, "mse")) == pytest.approx(float((a - b).square().mean()), rel=1e-5)
    assert float(apart(a, b, "cosine")) == pytest.approx(float(1 - F.cosine_similarity(a, b, -1).mean()), rel=1e-5)
    same = [float(apart(a, a.clone(), kind)) for kind in ("mse", "cosine", "kl")]
    assert same == pytest.approx([0, 0, 0], abs=1e-6)
    assert prediction({"logits": a}) is a and prediction((b, a)) is b
    with pytest.raises(LinsightError, match="pass predict="):
        prediction({"scores": a})


def test_blocks_are_those_of_the_innermost_list(teacher):
    assert blocks(linearize(teacher, "linear")) == ["blocks.0", "blocks.1"]
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    assert blocks(linearize(swin, "linear")) == ["layers.0.blocks.0", "layers.1.blocks.0"]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda t, b: distil_layers(t, linearize(t, "linear"), b), "linear brought no parameters that a layer"),
        (lambda t, b: distil_layers(t, linearize(t, "hedgehog"), [], steps=1), "there are no batches"),
        (lambda t, b: distil_layers(t, linearize(t, "hedgehog"), iter(b), steps=9), "gone through only once"),
        (lambda t, b: distil_layers(t, copy.deepcopy(t), b), "the student has no converted layer"),
        (
            lambda t, b: distil_layers(linearize(t, "linear"), linearize(t, "hedgehog"), b, steps=1),
            r"the teacher's blocks\.0\.attn is converted, too",
        ),
        (lambda t, b: distil(t, linearize(t, "linear"), b, recovery=Recovery(train="new")), "nothing to train"),
        (lambda t, b: distil(t, linearize(t, "linear"), b, recovery=Recovery(logits=0, hidden=0)), "nothing to learn"),
        (lambda t, b: Recovery(lr=-1), "lr=-1 of a Recovery must be 0 or more"),
        (lambda t, b: Recovery(train="some"), "train of a Recovery 'some'"),
        (
            lambda t, b: distil(t, linearize(t, "linear"), [x * float("nan") for x in b], steps=1),
            r"the loss of step 0 is not finite",
        ),
    ],
)
def test_bad_input_is_one_line(teacher, batches, act, words):
    with pytest.raises(LinsightError, match=words) as caught:
        act(teacher, batches)
    assert "\n" not in str(caught.value)


# ---- on disk


@pytest.mark.parametrize("tell", [True, False])
def test_what_is_saved_is_what_is_loaded(teacher, batches, tmp_path, tell):
    student = linearize(teacher, "rala", layers=[1], centred=True, inherit={"out": "freeze"})
    distil_layers(teacher, student, batches, steps=1)
    save_linearized(student, tmp_path / "student")
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["linearized.json", "model.safetensors"]
    if tell:
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
        loaded = load_linearized(tmp_path / "student", model)
        assert loaded is model
    else:
        with pytest.raises(LinsightError, match=r"holds another model than this VisionTransformer: 1[0-9] tensors"):
            load_linearized(tmp_path / "student", timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 3}))
        wide = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
        student = linearize(wide, "hedgehog")
        save_linearized(student, tmp_path / "student")
        loaded = load_linearized(tmp_path / "student")
    assert converted_layers(loaded) == converted_layers(student)
    torch.testing.assert_close(loaded(batches[0]), student(batches[0]), rtol=0, atol=0)


def test_damaged_folders_are_one_line(teacher, tmp_path):
    with pytest.raises(LinsightError, match="no converted layer"):
        save_linearized(teacher, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    save_linearized(linearize(teacher, "hedgehog"), tmp_path)
    table, weights = tmp_path / "linearized.json", tmp_path / "model.safetensors"
    text, bytes_ = table.read_text(), weights.read_bytes()
    for content in ("", "[]", "{}", '{"layers": {}}', '{"layers": {"blocks.0.attn": 3}}', text.replace("neutral", "n")):
        table.write_text(content)
        with pytest.raises(LinsightError) as caught:
            load_linearized(tmp_path)
        assert "\n" not in str(caught.value)
    table.write_text(text.replace("vit_tiny_patch16_224", "vit_none"))
    with pytest.raises(LinsightError, match="timm cannot build its model"):
        load_linearized(tmp_path)
    table.write_text(text)
    weights.write_bytes(bytes_[:-4])
    with pytest.raises(LinsightError, match="cannot be read"):
        load_linearized(tmp_path, timm.create_model("vit_tiny_patch16_224", **SMALL))
