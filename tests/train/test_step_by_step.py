"""Training is timm's own pieces, called one after another: each update, and whole runs by what their folder holds."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from small import TINY, colours
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy
from torch import nn
from torchvision.transforms import Normalize

from linsight.data.images import Batch, Normalise, Samples, collate, eval_transform, train_transform
from linsight.data.random import Batches, seed_step
from linsight.tasks import task_of
from linsight.train import load_trained, open_data, resolve, resume, train
from linsight.train.learner import Learner
from linsight.train.model import build
from linsight.train.progress import Silent

CPU = torch.device("cpu")
UPDATES = 3  # of an epoch, where batches are made here
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
COLOURS = {**TINY, "in_chans": 3, "mean": MEAN, "std": STD, "epochs": 4, "smoothing": 0.1}
RECIPES = {
    # rates for half of this batch; clipping that is felt, which Adam would not
    "sgd": {
        "opt": "sgd",
        "lr": 0.05,
        "lr_base_batch": 64,
        "batch_size": 128,
        "warmup_lr": 0.01,
        "min_lr": 0.002,
        "clip_grad": 0.05,
        "ema": 0.9,
        "ema_warmup": True,
    },
    "adamw": {
        "opt": "adamw",
        "opt_args": {"eps": 1e-3, "layer_decay": 0.5, "betas": (0.8, 0.9)},
        "lr": 1e-2,
        "weight_decay": 0.3,
        "warmup_epochs": 0,
        "cooldown_epochs": 1,
        "drop_path": 0.2,
        "re_prob": 0.5,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_prob": 0.7,
        "mixup_switch_prob": 0.4,
        "ema": 0.8,
    },
    "constant": {"opt": "sgd", "opt_args": {"layer_decay": 0.5, "momentum": 0.5}, "sched": "none", "lr": 0.05},
}


def learner(recipe, model):
    """Ours, the one place here that knows how it is made."""
    return Learner(task_of(recipe, {"classes": tuple("0123456789")}), model, CPU, None, updates=UPDATES)


class Theirs:
    """timm's pieces in the order of timm's training script."""

    def __init__(self, recipe, model, updates):
        self.recipe, self.model, self.done = recipe, model, 0
        scale = recipe.batch_size / recipe.lr_base_batch if recipe.lr_base_batch else 1
        self.optimiser = create_optimizer_v2(
            model, recipe.opt, lr=recipe.lr * scale, weight_decay=recipe.weight_decay, **recipe.opt_args
        )
        self.schedule, self.epochs = create_scheduler_v2(
            self.optimiser,
            # without one, timm would leave the scales of layers out
            "constant" if recipe.sched == "none" else recipe.sched,
            num_epochs=recipe.epochs,
            warmup_epochs=0 if recipe.sched == "none" else recipe.warmup_epochs,
            warmup_lr=recipe.warmup_lr * scale,
            min_lr=recipe.min_lr * scale,
            cooldown_epochs=recipe.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=updates,
        )
        self.ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=recipe.ema_warmup) if recipe.ema else None
        self.normalise = Normalize(recipe.mean, recipe.std)
        self.erase = RandomErasing(recipe.re_prob, mode=recipe.re_mode, device="cpu")
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob,
                label_smoothing=recipe.smoothing,
                num_classes=10,
            )

    def update(self, images, targets):
        """One update on uint8 `images`: the loss, and the learning rates of the groups that it was made with."""
        images, criterion = self.normalise(images / 255), LabelSmoothingCrossEntropy(self.recipe.smoothing)
        images = self.erase(images)
        if self.mix:
            (images, targets), criterion = self.mix(images, targets), SoftTargetCrossEntropy()
        loss = criterion(self.model.train()(images), targets)
        self.optimiser.zero_grad()
        loss.backward()
        if self.recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimiser.step()
        rates = rates_of(self.optimiser)
        self.done += 1
        if self.ema:
            self.ema.update(self.model, step=self.done)
        self.schedule.step_update(self.done)
        return loss.item(), rates

    @property
    def evaluated(self):
        return self.ema.module if self.ema else self.model


def rates_of(optimiser):
    return [group["lr"] for group in optimiser.param_groups]


def close(ours, theirs, tolerance=2e-5):
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance, msg=f"{name} differs")


def picture_batch(count, channels=3):
    return Batch(torch.randint(256, (count, channels, 8, 8), dtype=torch.uint8), torch.randint(10, (count,)), [])


@pytest.mark.parametrize("name", RECIPES)
def test_each_update_is_that_of_timms_pieces(name):
    recipe = resolve("digits", {**COLOURS, "clip_grad": 0.0, **RECIPES[name]})
    model = build(recipe, 10)
    theirs, ours = Theirs(recipe, copy.deepcopy(model), UPDATES), learner(recipe, model)
    assert ours.epochs == theirs.epochs
    for done in range(UPDATES * theirs.epochs):
        batch = picture_batch(8)
        seed_step(done)
        wanted, rates = theirs.update(batch.images, batch.targets)
        seed_step(done)
        loss, count = ours.loss(batch, done // UPDATES)
        ours.backward(loss)
        ours.step(done)
        assert count == 8 and loss.item() == pytest.approx(wanted, rel=1e-5)
        assert rates_of(ours.optimiser) == pytest.approx(rates) and ours.lr == pytest.approx(max(rates))
        close(ours.model.state_dict(), theirs.model.state_dict())
        close(ours.evaluated.state_dict(), theirs.evaluated.state_dict())


def test_of_an_odd_number_of_images_all_but_the_last_are_mixed():
    recipe = resolve("digits", {**COLOURS, "mixup": 0.8})
    ours, batch = learner(recipe, build(recipe, 10)), picture_batch(7)
    found = []
    for part in (batch, Batch(batch.images[:6], batch.targets[:6], [])):
        seed_step(1)
        found.append(ours.loss(part, 0))
    assert [count for _, count in found] == [6, 6] and torch.equal(found[0][0], found[1][0])
    assert ours.loss(Batch(batch.images[:1], batch.targets[:1], []), 0) is None


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), (MEAN[:1], STD[1:2])])
def test_images_are_normalised_by_the_mean_and_deviation_of_each_channel(mean, std):
    recipe = resolve("digits", {**TINY, "in_chans": len(mean), "mean": mean, "std": std})
    images = picture_batch(2, len(mean)).images
    torch.testing.assert_close(Normalise(recipe, CPU)(images), Normalize(mean, std)(images / 255))


@pytest.mark.parametrize(
    "changes",
    [
        {"opt": "sgd", "lr": 0.1, "clip_grad": 0.5, "ema": 0.8, "ema_warmup": True, "batch_size": 400},
        {"opt_args": {"eps": 1e-3}, "lr": 1e-3, "drop_path": 0.2, "batch_size": 2000},  # one batch, not full
    ],
)
def test_a_run_is_that_of_timms_pieces(tmp_path, changes):
    """Its metrics and best weights: all batches in their order, in every epoch, and the evaluation of each."""
    recipe = resolve("digits", {**TINY, "clip_grad": 0.0, **changes})
    train(recipe, out=tmp_path / "run")
    data = open_data(recipe)
    order = Batches(len(data.train), recipe.batch_size, seed=recipe.seed, shuffle=True)
    samples = Samples(data.train, train_transform(recipe, (8, 8)), 1, recipe.seed)
    seen = Samples(data.val, eval_transform(recipe, (8, 8)), 1, recipe.seed)
    val = collate([seen[0, index] for index in range(len(seen))])
    seed_step(recipe.seed)
    theirs, best = Theirs(recipe, build(recipe, 10), len(order)), -1.0
    for epoch, row in enumerate(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())):
        order.epoch, losses = epoch, []
        for step, items in enumerate(order):
            batch = collate([samples[item] for item in items])
            seed_step(recipe.seed, epoch, step)
            loss, rates = theirs.update(batch.images, batch.targets)
            losses.append(loss)
        with torch.no_grad():
            logits = theirs.evaluated.eval()(theirs.normalise(val.images / 255))
        top1, top5 = (float(value) for value in accuracy(logits, val.targets, (1, 5)))
        if top1 > best:
            best, weights = top1, copy.deepcopy(theirs.evaluated.state_dict())
        assert row["epoch"] == epoch + 1 and row["lr"] == pytest.approx(max(rates))
        assert row["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert row["val_loss"] == pytest.approx(nn.CrossEntropyLoss()(logits, val.targets).item(), rel=1e-4)
        assert (row["top1"], row["top5"]) == pytest.approx((top1, top5), abs=1e-3)
    close(load_file(tmp_path / "run" / "best.safetensors"), weights, 1e-3)
    assert load_trained(tmp_path / "run").classes == data.classes


def test_of_equal_epochs_the_first_is_the_best(tmp_path):
    """The weights do not move, so all epochs are alike."""
    still = {"opt": "sgd", "lr": 1e-30, "sched": "none", "weight_decay": 0.0, "clip_grad": 0.0, "epochs": 3}
    data = colours(tmp_path / "data", {"blue": 10, "red": 10})
    summary = train(resolve("digits", {**COLOURS, **still, "data": str(data), "batch_size": 8}), out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({row["top1"] for row in rows}) == 1 and summary["best_epoch"] == 1


class Killed(BaseException):
    pass


class Kill(Silent):
    def step(self, *done):
        raise Killed


@pytest.mark.parametrize("asked", [False, True])
def test_a_resumed_run_has_the_threads_of_the_machine_it_began_on(tmp_path, asked):
    """Where its recipe names none; unless others are asked for."""
    before, data = torch.get_num_threads(), str(colours(tmp_path / "data", {"blue": 10, "red": 10}))
    try:
        torch.set_num_threads(before + 1)
        with pytest.raises(Killed):
            train(resolve("digits", {**COLOURS, "data": data, "batch_size": 8}), out=tmp_path / "run", report=Kill())
        torch.set_num_threads(before)
        with pytest.raises(Killed):
            resume(tmp_path / "run", overrides={"threads": before + 2} if asked else {}, report=Kill())
        assert torch.get_num_threads() == before + (2 if asked else 1)
    finally:
        torch.set_num_threads(before)
