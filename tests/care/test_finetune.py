"""Starting from weights: the recipe for it, a new head alone, and softmax weights in another mechanism."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import linsight
from linsight import cli
from linsight.tasks import task_of
from linsight.train import load_run, resolve, suggest, train
from linsight.train.loop import Trainer
from linsight.train.progress import Silent
from linsight.train.run import Run

# Convolutions with batch norms, then a block.
HOST = "stem=((8,1),),stages=((16,1,2),)"
RUN = {"model": "compact_pico", "attention": "linear", "model_args": HOST, "epochs": 1, "warmup_epochs": 0}
QUICK = {"device": "cpu", "amp": "off", "threads": 1, "workers": 0, "figures": False}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits, all but its first epoch left out."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    train(resolve("digits", {**RUN, **QUICK, "crop_padding": 2}), out=out)
    return out


@pytest.fixture
def photos(tmp_path):
    """Grey images of ten classes that differ in brightness."""
    rng = np.random.default_rng(0)
    for level in range(10):
        (tmp_path / "photos" / f"{level}").mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(20 * level, 20 * level + 20, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{level}" / f"{i}.png")
    return str(tmp_path / "photos")


def test_a_run_that_starts_from_weights_is_fine_tuned(digits, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    options = [f"--{name}={value}" for name, value in QUICK.items() if name != "figures"]
    command = ["train", "--init", str(digits), "--data", photos, "--epochs", "2", "--out", str(out), "--no-figures"]
    monkeypatch.setattr(sys, "argv", ["linsight", *command, *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "recipe finetune: fine-tuning of what --init names" in capsys.readouterr().out
    before, after = load_run(digits), load_run(out)
    images = ("img_size", "in_chans", "mean", "std", "crop_mode", "crop_padding")
    for name in ("model", "attention", "model_args", *images):
        assert getattr(after.recipe, name) == getattr(before.recipe, name), name
    ours = resolve("finetune")
    for name in ("lr", "layer_decay", "new_lr_scale", "warmup_epochs", "min_lr"):
        assert getattr(after.recipe, name) == getattr(ours, name) != getattr(before.recipe, name), name
    assert after.recipe.data == photos and after.recipe.epochs == 2


def test_fields_of_a_run_can_be_changed_and_its_data_is_kept_with_it(digits, tmp_path):
    assert suggest({"init": str(digits)}) == suggest({"init": "published.pth", "data": "imagenet"}) == "finetune"
    again = resolve("finetune", {"init": str(digits), "img_size": 16, "lr": 1e-3})
    assert (again.data, again.val_fraction, again.img_size, again.lr) == ("digits", 0.2, (16,), 1e-3)
    other = resolve("finetune", {"init": str(digits), "model": "vit_tiny", "data": "photos", "num_classes": 3})
    assert (other.model_args, other.img_size, other.val_fraction, other.num_classes) == ({}, (8,), 0.1, 3)
    alone = tmp_path / "mine.safetensors"
    alone.write_bytes((digits / "best.safetensors").read_bytes())
    assert resolve("finetune", {"init": str(alone)}).model_args == again.model_args
    for none in (tmp_path / "none.pth", tmp_path):  # what is wrong with them, loading tells
        assert resolve("finetune", {"init": str(none)}).model == resolve("finetune").model


def learner_of(recipe, out):
    task = task_of(recipe)
    return Trainer(Run.start(recipe, out, "run"), task, task.open(), Silent()).learner


def test_rates_decay_with_depth_and_a_new_head_learns_faster(digits, photos, tmp_path):
    recipe = resolve("finetune", {**QUICK, "init": str(digits), "data": photos, "num_classes": 12})
    learner = learner_of(recipe, tmp_path / "run")
    names = {id(parameter): name for name, parameter in learner.model.named_parameters()}
    scales = {names[id(p)]: g["lr_scale"] for g in learner.optimiser.param_groups for p in g["params"]}
    assert len(scales) == len(names)
    assert scales["head.fc.weight"] == 10 > scales["stages.0.blocks.0.attn.qkv.weight"] > scales["stem.0.conv.weight"]


@pytest.mark.parametrize("classes", [None, 17], ids=["as many classes", "others"])
def test_a_linear_probe_trains_a_new_head_alone(digits, photos, tmp_path, classes):
    known = load_run(digits).model.state_dict()
    given = {"init": str(digits), "data": photos, "freeze": True, "epochs": 2, "num_classes": classes}
    recipe = resolve("finetune", {**QUICK, **given})
    learner = learner_of(recipe, tmp_path / "before")
    start = {name: value.clone() for name, value in learner.model.state_dict().items()}
    train(recipe, out=tmp_path / "run")
    trained = load_run(tmp_path / "run").model.state_dict()
    assert any("running_mean" in name for name in trained)
    for name, value in trained.items():  # statistics of batch norms too
        if name.startswith("head.fc."):
            assert not torch.equal(value, start[name]), name
            assert value.shape != known[name].shape or not torch.equal(start[name], known[name]), name
        else:
            assert torch.equal(value, known[name]), name


def test_softmax_weights_of_timm_start_another_mechanism(tmp_path):
    deit = timm.create_model("deit_tiny_patch16_224", depth=2, num_classes=10).state_dict()
    save_file(deit, tmp_path / "deit.safetensors")
    options = {"init": str(tmp_path / "deit.safetensors"), "init_partial": True, "model": "inline_deit_tiny"}
    recipe = resolve("finetune", {**QUICK, **options, "model_args": "depth=2", "data": "digits", "in_chans": 3})
    learner = learner_of(recipe, tmp_path / "run")
    ours = learner.model.state_dict()
    for key in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"):
        assert torch.equal(ours[f"blocks.1.attn.{key}"], deit[f"blocks.1.attn.{key}"])
    assert torch.equal(ours["head.weight"], deit["head.weight"])
    assert learner.new and all(".attn.core.generator." in name for name in learner.new)
    assert len(learner.new) == sum(name not in deit for name in ours)
    logits = learner.model(torch.randn(1, 3, 224, 224))
    report = linsight.load_published(linsight.create_model("inline_deit_tiny", depth=2), deit, strict=False)
    assert logits.shape == (1, 10) and len(report.loaded) == len(ours) - len(learner.new) - 2


GUIDE = (Path(__file__).parents[2] / "docs" / "fine-tune.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_are_understood(digits, photos, monkeypatch, command):
    """Up to the run itself, with what is spoken of in its place."""
    found = []
    monkeypatch.setattr("linsight.train.train", lambda recipe, **more: found.append(recipe) or sys.exit(0))
    placed = {"runs/NAME": str(digits), "path/to/images": photos, "imagenet": photos}
    words = [placed.get(word, word) for word in shlex.split(command)]
    assert words[:2] == ["linsight", "train"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    given = dict(re.findall(r"--([\w-]+) ([^-\s]\S*)", " ".join(words)))
    (recipe,) = found
    for option, text in given.items():
        if option != "recipe":
            name = option.replace("-", "_")
            assert getattr(recipe, name) == type(recipe).parse(name, text), option
    assert ("--freeze" in words) == recipe.freeze and ("--init-partial" in words) == recipe.init_partial
