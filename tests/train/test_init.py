"""Starting from other weights: published ones, or those of a run."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small import TINY, colours, truncate

import linsight
from linsight.errors import CheckpointError, LinsightError
from linsight.runtime.signals import Interrupted
from linsight.tasks import task_of
from linsight.train import load_trained, resolve, resume, train
from linsight.train.loop import Trainer
from linsight.train.progress import Silent
from linsight.train.run import Run

MODEL = "patch_size=2,embed_dim=16,depth=2,num_heads=2,global_pool=avg,class_token=False"
START = {**TINY, "model": "inline_deit_tiny", "attention": None, "model_args": MODEL, "batch_size": 512}


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class Interrupt(Silent):
    """Stops a run like a lost connection: at a step, with nothing more saved."""

    def __init__(self, at):
        self.left = at

    def step(self, *done):
        self.left -= 1
        if not self.left:
            raise Interrupted("stopped", 130)


def small(classes, side=8, **options):
    arguments = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "global_pool": "avg"}
    return linsight.create_model(
        "inline_deit_tiny", num_classes=classes, in_chans=1, img_size=side, class_token=False, **arguments, **options
    )


@pytest.fixture
def published(tmp_path):
    """Weights under their published keys, in the wrapper of a training checkpoint, of 1000 classes."""
    model = small(1000)
    torch.save({"model": linsight.export_published(model), "epoch": 299}, tmp_path / "published.pth")
    return model.state_dict(), tmp_path / "published.pth"


def before_training(out, **overrides):
    """The weights of a run before its first step, and what it said."""
    notes = Notes()
    recipe = resolve("digits", {**START, **overrides})
    task = task_of(recipe)
    return Trainer(Run.start(recipe, out, "run"), task, task.open(), notes).learner, notes.notes


def test_a_run_starts_from_published_weights_with_a_fresh_classifier(tmp_path, published):
    state, path = published
    learner, notes = before_training(tmp_path / "run", init=str(path), ema=0.9)
    plain, _ = before_training(tmp_path / "plain")
    for model in (learner.model, learner.ema.module):
        for key, value in model.state_dict().items():
            same = plain.model.state_dict() if key.startswith("head.") else state
            assert torch.equal(value, same[key]), key
    assert any(f"from {path}, entry 'model'" in note and "kept: head.weight" in note for note in notes)


def test_a_classifier_of_as_many_classes_is_taken_over(tmp_path):
    model = small(10)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    learner, _ = before_training(tmp_path / "run", init=str(tmp_path / "a.safetensors"))
    assert all(torch.equal(value, learner.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_another_image_size_resamples_position_tables(tmp_path, published):
    state, path = published
    learner, notes = before_training(tmp_path / "run", init=str(path), img_size=16)
    assert learner.model.pos_embed.shape == (1, 64, 16) and state["pos_embed"].shape == (1, 16, 16)
    assert torch.equal(learner.model.state_dict()["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert any("resized: pos_embed from 4x4 to 8x8" in note for note in notes)


def test_a_run_goes_on_from_another_run_for_other_classes(tmp_path):
    first = train(resolve("digits", {**START, "epochs": 1}), out=tmp_path / "first")
    trained = load_trained(first["folder"]).model.state_dict()
    data = colours(tmp_path / "data", {"a": 8, "b": 8})
    learner, _ = before_training(
        tmp_path / "run", init=first["folder"], data=str(data), val_fraction=0.25, attention="inline"
    )
    assert learner.model.head.weight.shape == (2, 16)
    for key, value in learner.model.state_dict().items():
        assert key.startswith("head.") or torch.equal(value, trained[key])


def test_a_stopped_run_and_its_weights_do_without_the_file(tmp_path, published):
    _, path = published
    overrides = {**START, "init": str(path), "lr": "1e-4", "epochs": 1, "save_every": 1}
    train(resolve("digits", overrides), out=tmp_path / "whole")
    with pytest.raises(Interrupted):  # before anything is saved: it starts anew
        train(resolve("digits", overrides), out=tmp_path / "run", report=Interrupt(1))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["init"] == str(path)
    with pytest.raises(Interrupted):
        resume(tmp_path / "run", report=Interrupt(2))
    path.unlink()
    resume(tmp_path / "run")
    whole, ours = (load_trained(tmp_path / name).model.state_dict() for name in ("whole", "run"))
    assert all(torch.equal(value, ours[key]) for key, value in whole.items())


def test_what_cannot_be_started_from_is_refused_before_there_is_a_folder(tmp_path, published):
    _, path = published
    other = tmp_path / "other.pth"
    state = linsight.export_published(small(1000))
    del state["blocks.1.norm2.bias"]
    torch.save(state, other)
    for init, message in (
        (str(other), r"does not fit the model: 1 of .*\n(.*\n)*blocks.1.norm2.bias .* not in the checkpoint"),
        (str(tmp_path / "none.pth"), "none.pth"),
        (str(tmp_path), "best.safetensors"),
        (str(truncate(path)), "published.pth"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(resolve("digits", {**START, "init": init}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_what_it_started_from(tmp_path, published):
    with pytest.raises(Interrupted):
        train(resolve("digits", START), out=tmp_path / "run", report=Interrupt(1))
    with pytest.raises(LinsightError, match="a resumed run keeps its init"):
        resume(tmp_path / "run", overrides={"init": str(published[1])})


SOFTMAX = {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10, "in_chans": 1}
# Another mechanism in the same host: the convolutions of InLine are new, and there is no class token.
CONVERT = {**START, "model_args": f"{MODEL},fc_norm=False", "epochs": 1, "init_partial": True, "new_lr_scale": 20.0}


@pytest.fixture
def softmax(tmp_path):
    """Weights of a plain ViT with a class token."""
    model = linsight.create_model("vit_tiny", attention="softmax", img_size=8, **SOFTMAX)
    torch.save({"model": model.state_dict()}, tmp_path / "softmax.pth")
    return model.state_dict(), str(tmp_path / "softmax.pth")


def test_what_other_weights_lack_stays_as_initialised_and_learns_faster(tmp_path, softmax):
    state, path = softmax
    with pytest.raises(CheckpointError, match="not in the checkpoint"):
        before_training(tmp_path / "strict", init=path)
    learner, notes = before_training(tmp_path / "run", **{**CONVERT, "init": path})
    plain, _ = before_training(tmp_path / "plain")
    own = learner.model.state_dict()
    new = [name for name in own if name not in state]
    assert learner.new == sorted(new) and len(new) == 8 and all(".attn." in name for name in new)
    for name, value in own.items():
        inherited = state[name][:, 1:] if name == "pos_embed" else state.get(name)
        assert torch.equal(value, plain.model.state_dict()[name] if name in new else inherited), name
    count = sum(own[name].numel() for name in new)
    assert any(note.startswith(f"new: {count} parameters in 8 tensors stay as initialised: blocks.0") for note in notes)
    learner.backward(sum(p.sum() for p in learner.model.parameters()))
    learner.step(1)
    named = {id(p): name for name, p in learner.model.named_parameters()}
    rates = {named[id(p)]: g["lr"] for g in learner.optimiser.param_groups for p in g["params"]}
    assert rates.keys() == set(named.values())
    assert learner.lr == rates["pos_embed"] > 0
    for name, rate in rates.items():
        assert rate == pytest.approx(learner.lr * (20 if name in new else 1)), name
    decayed = {named[id(p)] for g in learner.optimiser.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {name for name in own if own[name].ndim > 1 and name != "pos_embed"}


def test_a_rate_without_a_schedule_is_scaled_too(tmp_path, softmax):
    learner, _ = before_training(tmp_path / "run", **{**CONVERT, "init": softmax[1], "sched": "none", "lr": 1e-3})
    learner.backward(sum(p.sum() for p in learner.model.parameters()))
    learner.step(0)
    assert sorted({group["lr"] for group in learner.optimiser.param_groups}) == pytest.approx([1e-3, 2e-2])


def test_frozen_weights_stay_and_a_resumed_run_knows_the_new_ones(tmp_path, softmax):
    state, path = softmax
    overrides = {**CONVERT, "init": path, "freeze": True, "save_every": 1, "weight_decay": 0.1}
    with pytest.raises(Interrupted):
        train(resolve("digits", overrides), out=tmp_path / "run", report=Interrupt(2))
    train(resolve("digits", overrides), out=tmp_path / "whole")
    torch.save({}, path)
    resume(tmp_path / "run")
    whole, ours = (load_trained(tmp_path / name).model.state_dict() for name in ("whole", "run"))
    for name, value in ours.items():
        assert torch.equal(value, whole[name])
        assert name not in state or torch.equal(value, state[name][:, -16:] if name == "pos_embed" else state[name])
    plain, _ = before_training(tmp_path / "plain")
    assert all(name in state or not torch.equal(value, plain.model.state_dict()[name]) for name, value in ours.items())


def test_new_weights_need_old_ones(tmp_path, published):
    for overrides, message in (
        ({"freeze": True}, "give it weights, init="),
        ({"new_lr_scale": 20}, "give it weights, init="),
        ({"freeze": True, "init": str(tmp_path / "same.safetensors"), "init_partial": True}, "trains a new head where"),
    ):
        save_file(small(10).state_dict(), tmp_path / "same.safetensors")
        with pytest.raises(LinsightError, match=message):
            train(resolve("digits", {**START, **overrides}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    learner, _ = before_training(tmp_path / "linear", init=str(published[1]), freeze=True)
    assert [name for name, p in learner.model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
