"""What an update does: the losses, which parameters it changes, and how fast."""

import random
import typing

import numpy as np
import pytest
import torch
from small import TINY
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

import linsight.tasks.task
import linsight.train.trainer
from linsight.data.images import Batch, Samples, train_transform
from linsight.errors import LinsightError
from linsight.tasks import Classify, task_of
from linsight.train import load_trained, open_data, resolve, train
from linsight.train.learner import Learner, ema_decay
from linsight.train.model import build

CPU = torch.device("cpu")


def learner(model=None, **overrides):
    recipe = resolve("digits", {**TINY, "smoothing": 0.1, **overrides})
    torch.manual_seed(0)
    task = task_of(recipe, {"classes": tuple("0123456789")})
    return Learner(task, model or build(recipe, 10), CPU, None, updates=5)


def batch(count=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.randint(10, (count,), generator=generator), [])


def test_mesa_adds_what_the_averaged_weights_say_from_its_epoch_on():
    ours = learner(ema=0.5, mesa=1.5, mesa_start=0.5, epochs=5)
    with torch.no_grad():
        for parameter in ours.ema.module.parameters():
            parameter.add_(0.1)
    images = ours.task.inputs(batch().images)
    logits = ours.model.train()(images)
    plain = F.cross_entropy(logits, batch().targets, label_smoothing=0.1)
    taught = -(ours.ema.module(images).softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    for epoch, expected in ((0, plain), (1, plain), (2, plain + 1.5 * taught), (4, plain + 1.5 * taught)):
        loss, count = ours.loss(batch(), epoch)
        torch.testing.assert_close(loss, expected)
        assert count == 6
    loss.backward()
    assert all(parameter.grad is None for parameter in ours.ema.module.parameters())


def test_mesa_sees_the_mixed_images():
    ours = learner(ema=0.5, mesa=1.0, mesa_start=0.0, mixup=0.8)
    seen = []
    for model in (ours.model, ours.ema.module):
        model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ours.loss(batch(), 0)
    assert len(seen) == 2 and torch.equal(*seen) and not torch.equal(seen[0], ours.task.inputs(batch().images))


class Outputs(typing.NamedTuple):
    early: torch.Tensor
    late: torch.Tensor


class Exits(nn.Module):
    """Two sets of logits in training, the last one in evaluation."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(64, 10), nn.Linear(64, 10)
        self.pretrained_cfg = {"input_size": (1, 8, 8)}

    def forward(self, x):
        x = x.flatten(1)
        return Outputs(self.early(x), self.late(x)) if self.training else self.late(x)

    def training_loss(self, outputs, targets, criterion):
        return 0.25 * criterion(outputs.early, targets) + criterion(outputs.late, targets)


def test_a_model_may_have_a_loss_of_its_own():
    ours = learner(Exits())
    loss, _ = ours.loss(batch(), 0)
    early, late = ours.model(ours.task.inputs(batch().images))
    targets = batch().targets
    expected = 0.25 * F.cross_entropy(early, targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected + F.cross_entropy(late, targets, label_smoothing=0.1))
    with pytest.raises(LinsightError, match="'vit_tiny' has a loss of its own"):
        learner(Exits(), ema=0.9, mesa=1.0)


def test_such_a_model_goes_through_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(linsight.tasks.task, "build", lambda recipe, classes: Exits())
    options = {"batch_size": 32, "lr": "1e-2", "epochs": 2, "mixup": 0.2, "ema": 0.5}
    recipe = resolve("digits", {**TINY, **options})
    summary = train(recipe, out=tmp_path / "run")
    assert summary["top1"] > 60
    assert isinstance(load_trained(tmp_path / "run").model, Exits)


def test_copies_of_an_image_are_augmented_each_in_its_own_way():
    recipe = resolve("digits", {"re_prob": 0.0})
    samples = Samples(open_data(recipe).train, train_transform(recipe, (8, 8)), 1, 0)
    copies = [samples[0, 3, copy][0] for copy in range(8)]
    assert torch.equal(copies[5], samples[0, 3, 5][0]) and samples[0, 3, 5][1] == samples[0, 3][1]
    assert len({tuple(image.flatten().tolist()) for image in copies}) > 3


def test_the_decay_of_averages_is_that_of_the_batch():
    recipe = resolve().changed(ema=0.9996, ema_base_batch=4096)
    for size, decay in ((4096, 0.9996), (1024, 0.9999), (512, 0.99995)):
        assert ema_decay(recipe.changed(batch_size=size)) == pytest.approx(decay, abs=1e-7)
    assert ema_decay(recipe.changed(ema_base_batch=0)) == 0.9996
    assert learner(ema=0.5, ema_base_batch=64, batch_size=128).ema.decay == 0.25


@pytest.mark.parametrize(
    ("model", "decays", "stays"),
    [
        ("agent_swin_tiny", ("an_bias", "aw_bias", "ha_bias"), ("relative_position_bias_table", "qkv.bias")),
        ("agent_pvt_tiny", ("na_bias", "ah_bias", "pos_embed"), ("proj.bias", "norm1.weight")),
        ("agent_deit_tiny", ("ac_bias", "ca_bias"), ("pos_embed", "cls_token")),
        ("vittt_tiny", ("core.w1", "core.w2", "core.kernel"), ("cpe.bias",)),
    ],
)
def test_what_decays_is_what_decayed_in_the_published_training(model, decays, stays):
    with torch.device("meta"):
        built = build(resolve(model), 1000)
    groups = param_groups_weight_decay(built, 0.05, no_weight_decay_list=built.no_weight_decay())
    named = {id(parameter): name for name, parameter in built.named_parameters()}
    decayed = {named[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    for ending in decays:
        found = [name for name in named.values() if name.endswith(ending)]
        assert found and decayed.issuperset(found), ending
    for ending in stays:
        found = [name for name in named.values() if name.endswith(ending)]
        assert found and decayed.isdisjoint(found), ending


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.0}, marks=pytest.mark.full),
        {"batch_size": 62, "mixup": 0.5},
    ],
)
def test_a_batch_in_parts_is_learned_as_in_one(tmp_path, more):
    more = {**TINY, "ema": 0.9, "clip_grad": 1.0, "lr": 1e-3, **more}
    found = [train(resolve("digits", {**more, "accumulate": n}), out=tmp_path / str(n)) and n for n in (1, 2, 5)]
    one, *others = (load_trained(tmp_path / str(n)).model.state_dict() for n in found)
    for other in others:
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-4)
    start = build(resolve("digits", more), 10).state_dict()
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 0.02  # which is far more


def test_a_part_counts_as_much_as_it_has_images():
    """Of a sum over the parts, what a mean over the batch is."""
    for images, accumulate in ((7, 3), (6, 4), (10, 4), (5, 1)):
        parts = list(learner(accumulate=accumulate, batch_size=images).parts(batch(images)))
        assert sum(part.images for part in parts) == sum(len(part.batch.images) for part in parts) == images
        assert [part.share for part in parts] == pytest.approx([part.images / images for part in parts])
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]


def test_every_update_and_every_part_of_it_draws_by_a_key_of_its_own(tmp_path, monkeypatch):
    drawn = {"seed_step": [], "seed_noise": []}
    for name, keys in drawn.items():
        monkeypatch.setattr(linsight.train.trainer, name, lambda *key, keys=keys: keys.append(key))
    monkeypatch.setattr(Classify, "loss", lambda self, student, batch, epoch: (no_loss(student), len(batch.images)))
    train(resolve("digits", {**TINY, "seed": 4, "batch_size": 512, "accumulate": 3}), out=tmp_path / "run")
    steps = [(4, epoch, step) for epoch in range(2) for step in range(2)]
    assert drawn["seed_step"] == [(4,), *(step for step in steps for _ in range(3))]  # first for the weights
    assert drawn["seed_noise"] == [(*step, part) for step in steps for part in (1, 2)]


def no_loss(student):
    return sum(p.sum() for p in student.model.parameters()) * 0


def test_in_every_part_images_are_mixed_alike_and_a_model_drops_others(tmp_path, monkeypatch):
    seen = []

    def loss(self, student, batch, epoch):
        seen.append((len(batch.images), np.random.rand(), random.random(), float(torch.rand(()))))
        return no_loss(student), len(batch.images)

    monkeypatch.setattr(Classify, "loss", loss)
    train(
        resolve("digits", {**TINY, "epochs": 1, "warmup_epochs": 0, "batch_size": 62, "accumulate": 4}),
        out=tmp_path / "r",
    )
    first, second = seen[:4], seen[4:8]
    assert [count for count, *_ in first] == [14, 16, 16, 16]
    for step in (first, second):
        assert len({numbers[1:3] for numbers in step}) == 1 and len({noise for *_, noise in step}) == 4
    assert first[0][1:] != second[0][1:]
