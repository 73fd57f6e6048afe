"""The task `linearize`: a softmax run becomes one of a mechanism, in two stages, and is a run like any other."""

import copy
import json
import re

import pytest
import timm
import torch
from PIL import Image
from small import TINY
from torch.nn import functional as F

import linsight
from linsight.attention import Core
from linsight.bench import Subject
from linsight.bench.runs import build_run
from linsight.convert import converted_layers, layer_errors, linearize, new_parameters
from linsight.convert.mixing import mixings
from linsight.convert.saved import told_layers
from linsight.convert.transfer import relative_error
from linsight.data.images import Batch
from linsight.errors import LinsightError
from linsight.export import open_exported
from linsight.runtime.signals import Interrupted
from linsight.tasks import task_of
from linsight.train import evaluate, from_pretrained, load_run, load_trained, resolve, resume, train
from linsight.train.learner import Learner
from linsight.train.progress import Silent

VIT = "patch_size=2,embed_dim=16,depth=2,num_heads=2,global_pool=avg,class_token=False"
QUICK = {**TINY, "model_args": VIT, "batch_size": 256, "lr": "1e-2", "warmup_epochs": 0, "threads": 1}
TASK = {**QUICK, "task": "linearize", "attention": "hedgehog", "epochs": 2, "transfer_steps": 6, "lr": "1e-3"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A softmax run on digits."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train(resolve("digits", {**QUICK, "attention": "softmax", "epochs": 6, "batch_size": 64}), out=out)
    return out


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """A run that linearizes it."""
    out = tmp_path_factory.mktemp("runs") / "student"
    summary = train(resolve("digits", {**TASK, "teacher": str(teacher), "report": True}), out=out)
    return out, summary


def test_a_run_becomes_linear(teacher, student):
    out, summary = student
    before = json.loads((teacher / "summary.json").read_text())
    assert summary["top1"] > before["top1"] - 5
    trained = load_trained(out)
    rows = converted_layers(trained.model)
    assert list(rows) == ["blocks.0.attn", "blocks.1.attn"] and {row.attention for row in rows.values()} == {"hedgehog"}
    layers = json.loads((out / "config.json").read_text())["data"]["layers"]
    assert all(after < before for before, after in layers.values()) and list(layers) == list(rows)
    assert evaluate(trained)["top1"] == pytest.approx(summary["top1"])
    assert load_run(out).predict(Image.new("L", (8, 8)))


def test_its_page_tells_what_each_stage_and_what_the_mechanism_brought(teacher, student, linsight, monkeypatch):
    out, _ = student
    stages = json.loads((out / "config.json").read_text())["data"]["stages"]
    before = json.loads((teacher / "summary.json").read_text())
    assert stages["teacher"] == pytest.approx(before["top1"], abs=0.01) and stages["layers"] > stages["replaced"]
    trained = load_trained(out)
    task = trained.task
    task.begin(torch.device("cpu"))
    (control,) = task.controls(trained.model).values()
    images = torch.randn(3, 1, 8, 8)
    by_hand = copy.deepcopy(trained.model)
    for mixing in mixings(by_hand).values():
        mixing.core.forward = lambda tokens, *_, **__: tokens.v.mean(1, keepdim=True).expand_as(tokens.q)
    torch.testing.assert_close(control(images), by_hand(images))
    page = (out / "report.html").read_text()
    for words in (
        "the same weights, attention is the mean of the values",
        f"{stages['layers']:.2f} %",
        "blocks.1.attn",
    ):
        assert words in page
    monkeypatch.setattr("linsight.cli.report.SECONDS", 0.1)
    code, _, err = linsight("report", out, "--beside", teacher, "--speed", "--out", out / "more.html")
    assert code == 0, err
    more = (out / "more.html").read_text()
    others = re.search(r"Beside other runs.*?</section>", more, re.DOTALL)[0]
    for summary in (before, student[1]):
        assert f"{summary['top1']:.2f} %" in others and f"{summary['params']:,}" in others
    for attention, kind in (("", "Hedgehog"), ("softmax", "Softmax")):
        timed = build_run(Subject("model", str(out), attention), (16, 16), "cpu")
        assert {type(part).__name__ for part in timed.modules() if isinstance(part, Core)} == {kind}
        assert timed(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
    assert re.search(r"32 pixels</bdi></td>\s*<td[^>]*>[\d.]+ ms", more)


@pytest.mark.parametrize("layers", [pytest.param("", marks=pytest.mark.full), "*.1.attn"])
def test_other_runs_start_from_it_at_other_sizes(teacher, tmp_path, layers):
    out = tmp_path / "student"
    train(resolve("digits", {**TASK, "teacher": str(teacher), "layers": layers, "epochs": 1}), out=out)
    for source in (out, out / "best.safetensors"):
        recipe = resolve("finetune", {"init": str(source), "img_size": 16, "data": "digits", "epochs": 1, "threads": 1})
        assert recipe.task == "classify" and recipe.model == "vit_tiny" and recipe.img_size == (16,)
    summary = train(recipe.changed(lr=1e-30, warmup_lr=0.0, min_lr=0.0, weight_decay=0.0), out=tmp_path / "larger")
    assert summary["attention"] == "hedgehog"
    softmax = build_run(Subject("model", str(tmp_path / "larger"), "softmax"), (16, 16), "cpu")
    assert not converted_layers(softmax)
    before, after = load_trained(out).model, load_trained(tmp_path / "larger").model
    assert summary["top1"] > 10 and converted_layers(before) == converted_layers(after)
    for name, tensor in before.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(tensor, after.state_dict()[name]), name


def test_what_is_named_anew_is_so_in_runs_that_start_from_it(teacher, student):
    init = {"init": str(student[0])}
    assert "linearized" in resolve("finetune", {**init, "model_args": VIT}).model_args
    for named in ({"attention": "softmax"}, {"attention": "inline"}, {"model": "inline_deit_tiny"}):
        assert "linearized" not in resolve("finetune", {**init, **named}).model_args
    with pytest.raises(LinsightError, match="is converted already"):
        train(resolve("finetune", {**TASK, "teacher": str(student[0])}))


def test_models_of_timm_are_converted_as_an_argument_says():
    options = {"img_size": 32, "depth": 2, "num_classes": 10}
    source = linsight.linearize(
        linsight.create_model("deit_tiny_patch16_224", attention="softmax", **options), "inline"
    )
    args = {"linearized": told_layers(source)}
    again = linsight.create_model("deit_tiny_patch16_224", attention="softmax", **options, **args)
    again.load_state_dict(source.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.eval()(images), source.eval()(images))


def test_it_is_pushed_and_exported_as_any_run(student, tmp_path, linsight):
    model, images = load_trained(student[0]).model, torch.rand(2, 1, 8, 8)
    code, _, err = linsight("push", student[0], "o/n", "--dry-run", "--out", tmp_path / "hub")
    assert code == 0, err
    for again in (
        timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True),
        from_pretrained(tmp_path / "hub").model,
    ):
        assert torch.equal(again.eval()(images), model(images))
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["model_args"]["linearized"]["blocks.7.attn"] = {"attention": "inline"}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    code, _, err = linsight("eval", tmp_path / "hub")
    assert code == 2 and "blocks.7.attn" in err and err.count("\n") == 1
    code, _, err = linsight("export", student[0], "--program", tmp_path / "m.pt2")
    assert code == 0, err
    torch.testing.assert_close(open_exported(tmp_path / "m.pt2").model(images), model(images))


def test_the_first_outputs_are_the_teachers_weights(teacher):
    recipe = resolve("digits", {**TASK, "teacher": str(teacher), "transfer_steps": 0})
    task = task_of(recipe)
    task.open()
    learner = Learner(task, task.build(), torch.device("cpu"), None, updates=5)
    theirs, ours = load_trained(teacher).model.state_dict(), learner.model.state_dict()
    new = set(new_parameters(learner.model))
    assert new and all(torch.equal(ours[key], theirs[key]) for key in ours if key not in new)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (6, 1, 8, 8), generator=generator, dtype=torch.uint8)
    targets = torch.randint(10, (6,), generator=generator)
    loss, count = learner.loss(Batch(images, targets, []), 0)
    kept = {}
    for who, model in (("ours", learner.model), ("theirs", load_trained(teacher).model)):
        kept[who] = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, out, kept=kept[who]: kept.append(out.detach()))
    x = task.inputs(images)
    logits, told = learner.model.train()(x).detach(), load_trained(teacher).model(x).detach()
    model = load_trained(teacher).model
    states = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: states.append(out.detach()))
    told = model(x).detach()
    labels = F.cross_entropy(logits, targets, label_smoothing=recipe.smoothing)
    p = (told / 2).softmax(-1)
    soft = 4 * (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
    hidden = torch.stack([relative_error(a, b) for a, b in zip(kept["ours"], states, strict=True)]).mean()
    assert count == 6
    assert float(loss.detach()) == pytest.approx(float(0.5 * labels + 0.5 * soft + hidden), rel=1e-3)


def test_the_classifier_is_inherited_class_by_class(teacher):
    recipe = resolve("digits", {**TASK, "attention": "mean", "teacher": str(teacher)})
    task = task_of(recipe, {"classes": tuple("9876543210")})
    learner = Learner(task, task.build(), torch.device("cpu"), None, updates=5)
    by_hand = linsight.linearize(load_trained(teacher).model, "mean").eval()
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(learner.model.eval()(images), by_hand(images).flip(-1))
    stages = task.facts["stages"]
    assert stages["teacher"] == pytest.approx(evaluate(load_trained(teacher))["top1"], abs=0.01)
    assert stages["replaced"] > 15  # by chance: 10


@pytest.mark.parametrize(("attention", "options"), [("inline", ""), ("mlla", ""), ("agent", "rotary=True"), ("t5", "")])
def test_formula_and_local_terms_are_judged_alone(teacher, attention, options):
    given = {**TASK, "attention": attention, "attention_options": options, "teacher": str(teacher), "transfer_steps": 0}
    task = task_of(resolve("digits", given), {"classes": tuple("0123456789")})
    model = Learner(task, task.build(), torch.device("cpu"), None, updates=5).model.eval()
    assert set(task.controls(model)) == {"mean"}  # local terms start at nothing
    for mixing in mixings(model).values():
        for parameter in mixing.core.parameters():
            torch.nn.init.normal_(parameter)
    found = task.controls(model)
    assert set(found) == {"formula", "local", "mean"}
    outs, images = {}, torch.randn(3, 1, 8, 8)
    for name, one in {**found, "": model}.items():
        one.blocks[0].attn.register_forward_hook(lambda *args, name=name: outs.update({name: args[2]}))
        one(images)
    bias = model.blocks[0].attn.proj.bias
    assert not torch.allclose(outs[""], outs["formula"], atol=1e-2)
    torch.testing.assert_close(outs["formula"] + outs["local"] - bias, outs[""], rtol=1e-4, atol=1e-4)
    measures = {name: {"top1": 10.0 + place} for place, name in enumerate(("formula", "local", "mean", ""))}
    rows = {row[0]: row[2] for row in task.compared(measures)[0].rows}
    assert rows["the same weights, without local terms"] == "10.00 %"
    assert rows["the same weights, only what local terms add"] == "11.00 %"


def test_the_hardest_layers_stay_softmax(teacher, tmp_path, linsight):
    ask = ("linearize", teacher, "--to", "mean", "--epochs", 1, "--set", "threads=1", "--out", tmp_path / "run")
    code, _, err = linsight(*ask, "--keep", 1)
    assert code == 0, err
    (kept,) = re.findall("softmax stays in (.*)", err)
    model, images = load_trained(teacher).model, torch.randn(64, 1, 8, 8)
    errors = layer_errors(model, linearize(model, "mean"), [images])
    assert set(errors) == {"blocks.0.attn", "blocks.1.attn"} and kept == max(errors, key=errors.get)
    assert list(converted_layers(load_trained(tmp_path / "run").model)) == [name for name in errors if name != kept]
    for count, words in ((2, "keep=2 leaves no layer to convert"), (3, "keep=3: 2 layers were measured")):
        code, _, err = linsight(*ask, "--keep", count)
        assert code == 2 and words in err and err.count("\n") == 1


class Stopping(Silent):
    def __init__(self, steps):
        self.left = steps

    def step(self, *args):
        self.left -= 1
        if not self.left:
            raise Interrupted("enough", 130)


def test_a_stopped_run_goes_on_without_its_first_stage(teacher, student, tmp_path, monkeypatch):
    out, summary = student
    with pytest.raises(Interrupted):
        train(
            resolve("digits", {**TASK, "teacher": str(teacher), "save_every": 1}),
            out=tmp_path / "run",
            report=Stopping(3),
        )
    monkeypatch.setattr("linsight.tasks.linearize.distil_layers", None)
    again = resume(tmp_path / "run")
    assert again["top1"] == summary["top1"]
    ends = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (out, tmp_path / "run")]
    assert ends[0]["train_loss"] == pytest.approx(ends[1]["train_loss"], rel=1e-5)


def test_it_streams_and_is_fused(student):
    model = load_run(student[0]).model.eval()
    image = torch.rand(1, 24, 40)
    streamed = linsight.stream(model, image, tile=16, mean=(0,), std=(1,))
    torch.testing.assert_close(streamed, model(image[None]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attention": "softmax"}, "replaces softmax: name the mechanism"),
        ({"teacher": "none"}, "the task linearize learns from a teacher"),
        ({"layers": "blocks.7.*"}, "unknown attention layer 'blocks.7.*'"),
        ({"model_args": VIT.replace("16", "24")}, "the teacher is not 'vit_tiny' with softmax: .* differ"),
        ({"attention": "fnet"}, "'fnet' is a whole layer"),
        ({"hidden": -1}, "hidden"),
    ],
)
def test_bad_input_is_one_line(teacher, tmp_path, given, words):
    with pytest.raises(LinsightError, match=words) as caught:
        train(resolve("digits", {**TASK, "teacher": str(teacher), **given}), out=tmp_path / "run")
    assert "\n" not in str(caught.value).split("\n\n")[0] and not (tmp_path / "run").exists()
