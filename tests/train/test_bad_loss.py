"""A loss that is no number: where it began is said, and the run ends or leaves the update out."""

import json
import math
import re

import pytest
import torch
from small import TINY, assert_same_end
from test_learner import batch, learner
from torch import nn

from linsight.errors import LinsightError
from linsight.tasks import Classify
from linsight.train import Interrupted, load_trained, resolve, resume, train
from linsight.train.bad_updates import MOST
from linsight.train.origin import bad_gradient, named, origin
from linsight.train.progress import Silent

FULL = {**TINY, "batch_size": 384, "epochs": 2}  # three steps an epoch


def spoil(module, value=math.inf, index=0):
    """Makes a value of the output of a module no number."""

    def after(module, args, output):
        output = output.clone(memory_format=torch.contiguous_format)
        output.view(-1)[index] = value
        return output

    return module.register_forward_hook(after)


PLACES = [
    ("blocks.1.attn.core", "in blocks.1.attn.core (inline)"),
    ("blocks.0.attn.qkv", "in blocks.0.attn.qkv (inline)"),
    ("blocks.0.mlp.fc1", "in blocks.0.mlp.fc1"),
    ("patch_embed.proj", "in patch_embed.proj"),
    ("head", "in head"),
]


@pytest.mark.parametrize(("path", "words"), PLACES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_module_is_named_where_it_begins(path, words, value):
    ours = learner()
    spoil(ours.model.get_submodule(path), value)
    assert origin(ours, lambda: ours.loss(batch(), 0)) == words
    before = sum(len(module._forward_hooks) for module in ours.model.modules())
    assert before == 1 and not any(module._forward_pre_hooks for module in ours.model.modules())


def test_what_a_module_does_itself_is_told_from_its_parts(monkeypatch):
    ours = learner()
    core = type(ours.model.blocks[1].attn.core)
    forward = core.forward

    def late(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        return found / 0 if self is ours.model.blocks[1].attn.core else found

    monkeypatch.setattr(core, "forward", late)
    assert origin(ours, lambda: ours.loss(batch(), 0)) == "in blocks.1.attn.core (inline)"


def test_weights_images_and_the_loss_itself_are_told():
    ours = learner(ema=0.5)
    assert origin(ours, lambda: ours.loss(batch(), 0)) == "" == origin(ours)
    with torch.no_grad():
        ours.ema.module.blocks[0].norm1.bias[3] = math.nan
        assert origin(ours) == "in the averaged weights, blocks.0.norm1.bias"
        ours.model.blocks[1].attn.qkv.weight[0, 0] = math.inf
        ours.model.head.bias[0] = math.nan
        assert origin(ours) == "in the weights, blocks.1.attn.qkv.weight (inline) and 1 more"
    ours = learner()
    ours.task.inputs.scale *= math.inf
    assert origin(ours, lambda: ours.loss(batch(), 0)) == "in the images, as they are normalised"
    ours = learner()
    found = origin(ours, lambda: (ours.loss(batch(), 0)[0] * math.nan, 6))
    assert found == "in the loss itself: what the model gives are numbers"


def test_the_gradient_is_told_from_its_end():
    ours = learner()
    loss, _ = ours.loss(batch(), 0)
    loss.backward()
    assert bad_gradient(ours) == ""
    for path in ("blocks.0.mlp.fc1.weight", "blocks.1.attn.proj.weight", "patch_embed.proj.bias"):
        ours.model.get_parameter(path).grad[0] = math.nan
    assert bad_gradient(ours) == "in the gradient of blocks.1.attn.proj.weight (inline) and 2 more"


def test_the_mechanism_is_that_of_the_nearest_module():
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    assert named(model, "a.weight") == "a.weight" and named(model, "b.c") == "b.c"


@pytest.fixture
def bad_steps(monkeypatch):
    """Makes the loss of some steps, counted from 0, no number."""
    plain, seen = Classify.loss, []

    def set_up(steps):
        seen.clear()

        def loss(self, student, batch, epoch):
            found = plain(self, student, batch, epoch)
            if torch.is_grad_enabled():  # it is computed anew to tell where it began
                seen.append(found)
            return (found[0] * math.nan, found[1]) if len(seen) - 1 in steps else found

        monkeypatch.setattr(Classify, "loss", loss)

    return set_up


def row_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_stops_says_where(tmp_path, monkeypatch):
    build = Classify.build

    def bad(self):
        model = build(self)
        spoil(model.blocks[1].attn.core)
        return model

    monkeypatch.setattr(Classify, "build", bad)
    with pytest.raises(LinsightError) as error:
        train(resolve("digits", FULL), out=tmp_path / "run")
    line = r"the loss became (nan|inf) in epoch 1, near step 1: it began in blocks\.1\.attn\.core \(inline\); lower lr"
    assert re.match(line, str(error.value)) and "\n" not in str(error.value)
    assert str(error.value).endswith("; no state was saved yet")


def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path, monkeypatch):
    build = Classify.build

    def bad(self):
        model = build(self)
        model.blocks[0].mlp.fc2.weight.register_hook(lambda gradient: gradient * math.nan)
        return model

    monkeypatch.setattr(Classify, "build", bad)
    with pytest.raises(LinsightError, match=r"it began in the gradient of blocks\.0\.mlp\.fc2\.weight; lower lr"):
        train(resolve("digits", FULL), out=tmp_path / "run")
    with pytest.raises(LinsightError, match=r"the loss became nan in epoch 1, .*in the gradient of"):
        train(resolve("digits", {**FULL, "on_bad_loss": "skip"}), out=tmp_path / "skip")  # of a whole epoch


def test_an_update_is_left_out_where_that_is_asked_for(tmp_path, bad_steps):
    bad_steps({1, 4})
    train(resolve("digits", {**FULL, "on_bad_loss": "skip"}), out=tmp_path / "run")
    rows = row_of(tmp_path / "run")
    assert [row["bad_updates"] for row in rows] == [1, 1] and all(row["train_loss"] > 0 for row in rows)
    assert all(value.isfinite().all() for value in load_trained(tmp_path / "run").model.state_dict().values())
    bad_steps(set())
    train(resolve("digits", FULL), out=tmp_path / "plain")
    assert "bad_updates" not in row_of(tmp_path / "plain")[0]


def test_skipping_changes_nothing_where_all_is_well(tmp_path):
    train(resolve("digits", FULL), out=tmp_path / "stop")
    train(resolve("digits", {**FULL, "on_bad_loss": "skip"}), out=tmp_path / "skip")
    ours, theirs = (load_trained(tmp_path / name).model.state_dict() for name in ("stop", "skip"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Cut(Silent):
    def __init__(self, steps):
        self.left = steps

    def step(self, *done):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_what_was_left_out_is_counted_over_a_resume(tmp_path, bad_steps):
    recipe = resolve("digits", {**FULL, "on_bad_loss": "skip", "save_every": 1})
    bad_steps({1})
    train(recipe, out=tmp_path / "whole")
    bad_steps({1})
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "cut", report=Cut(3))
    bad_steps(set())
    resume(tmp_path / "cut")
    assert row_of(tmp_path / "cut")[0]["bad_updates"] == 1
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_too_many_in_a_row_end_the_run(tmp_path, bad_steps):
    bad_steps(range(2, 10**6))
    with pytest.raises(LinsightError, match=f"{MOST} updates in a row were left out; it began in the loss itself"):
        train(resolve("digits", {**FULL, "batch_size": 32, "on_bad_loss": "skip"}), out=tmp_path / "run")


def test_statistics_of_batch_norms_are_put_back():
    from linsight.train.bad_updates import BadUpdates

    ours = learner(on_bad_loss="skip")
    ours.model.norm_pre = nn.BatchNorm1d(16)
    updates = BadUpdates(ours)
    updates.begin()
    ours.model.norm_pre(torch.full((2, 16), math.nan))
    assert updates.leave_out("") and ours.model.norm_pre.running_mean.isfinite().all()
    assert int(ours.model.norm_pre.num_batches_tracked) == 0
    assert updates.row() == {"bad_updates": 1} and updates.row() == {"bad_updates": 0}
