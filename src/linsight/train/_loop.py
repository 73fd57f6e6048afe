"""The training loop: plain PyTorch around timm's optimisers, schedules, mixing and averaging."""

import math
import os
import pathlib
import time
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from linsight.errors import CheckpointError, LinsightError

from . import _figures, _model
from ._data import Data, open_data
from ._device import autocast, pick_device, pick_dtype
from ._evaluate import probabilities, score
from ._images import Batch, Normalise, Samples, cached, eval_transform, loader, train_transform
from ._progress import Silent
from ._random import Batches, seed_step
from ._recipe import Recipe
from ._run import Run
from ._signals import Interrupted, Stop


def train(
    recipe: Recipe, *, out: str | pathlib.Path | None = None, name: str = "run", report: Silent | None = None
) -> dict[str, Any]:
    """Train by a recipe into a new run folder, `runs/<name>-<time>` unless told; the run's summary.

    Raises:
        LinsightError: the data, the model or the folder cannot be used, or the loss is no longer a number.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    return _go(Run.start(recipe, out, name), report or Silent())


def resume(
    path: str | pathlib.Path, *, overrides: dict[str, Any] | None = None, report: Silent | None = None
) -> dict[str, Any]:
    """Take a stopped run to its end: on the CPU bit for bit the one that it would have been."""
    return _go(Run.resume(path, overrides or {}), report or Silent())


def _go(run: Run, report: Silent) -> dict[str, Any]:
    if run.finished:
        report.note(f"the run in '{run.path}' is finished")
        return run.summary()
    if run.recipe.figures:
        _figures.require_matplotlib()
    if run.recipe.threads:
        torch.set_num_threads(run.recipe.threads)
    data = open_data(run.recipe)
    for note in data.notes:
        report.note(note)
    with Stop() as stop:
        trainer = Trainer(run, data, report, stop)
        state = run.load_state()
        if state is not None:
            trainer.load(state)
        try:
            return trainer.run_epochs()
        finally:
            report.end()


class Trainer:
    """One run in progress."""

    def __init__(self, run: Run, data: Data, report: Silent, stop: Stop) -> None:
        recipe = self.recipe = run.recipe
        self.run, self.data, self.report, self.stop = run, data, report, stop
        self.device = pick_device(recipe.device)
        self.dtype, precision = pick_dtype(recipe.amp, self.device)
        seed_step(recipe.seed)
        model = _model.build(recipe, len(data.classes))
        self.model = model.to(self.device)
        self.params = sum(parameter.numel() for parameter in model.parameters())
        self.size = _model.image_size(recipe, model)
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        if recipe.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._open_loaders()
        # the folder appears once the data and the model are known to be good
        run.describe({"train": len(data.train), "val": len(data.val), "classes": list(data.classes)})
        self._make_optimiser()
        self.compiled = torch.compile(self.model) if recipe.compile else self.model
        self.epoch = self.step = 0
        self.best: tuple[float, int] = (-1.0, 0)
        self.seconds = 0.0
        self._reset_sums()
        report.note(
            f"{recipe.model} ({recipe.attention or 'its own attention'}), {self.params / 1e6:.2f} M parameters, "
            f"{self.size[0]}x{self.size[1]}; {len(data.train)} images to train on, {len(data.val)} to evaluate, "
            f"{len(data.classes)} classes; {self.device}, {precision}; folder {run.path}"
        )

    def _open_loaders(self) -> None:
        recipe = self.recipe
        train, val = self.data.train, self.data.val
        self.lost: list[str] = []
        if recipe.cache:
            self.report.note("reading all images into memory")
            train, bad = cached(train, recipe.in_chans)
            val, more = cached(val, recipe.in_chans)
            self.lost = bad + more
            self._meet_bad(self.lost)
            for source, name in ((train, "train on"), (val, "evaluate on")):
                if not len(source):
                    raise LinsightError(f"no image to {name} could be read: {self.lost[0]}")
        workers = default_workers() if recipe.workers is None else recipe.workers
        pin = self.device.type == "cuda"
        self.batches = Batches(len(train), recipe.batch_size, seed=recipe.seed, shuffle=True)
        augment, prepare = train_transform(recipe, self.size), eval_transform(recipe, self.size)
        self.loader = loader(
            Samples(train, augment, recipe.in_chans, recipe.seed), self.batches, workers=workers, pin=pin
        )
        self.val = Samples(val, prepare, recipe.in_chans, recipe.seed)
        val_batches = Batches(len(val), recipe.batch_size, shuffle=False)
        self.val_loader = loader(self.val, val_batches, workers=min(workers, len(val_batches)), pin=pin)
        self.normalise = Normalise(recipe, self.device)
        self.erase = RandomErasing(recipe.re_prob, mode=recipe.re_mode, device=str(self.device))
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(
                recipe.mixup, recipe.cutmix, prob=recipe.mixup_prob, switch_prob=recipe.mixup_switch_prob,
                label_smoothing=recipe.smoothing, num_classes=recipe.num_classes or len(self.data.classes),
            )

    def _make_optimiser(self) -> None:
        recipe = self.recipe
        scale = recipe.batch_size / recipe.lr_base_batch if recipe.lr_base_batch else 1.0
        try:
            self.optimiser = create_optimizer_v2(
                self.model, recipe.opt, lr=recipe.lr * scale, weight_decay=recipe.weight_decay, **recipe.opt_args
            )
            self.schedule, self.epochs = create_scheduler_v2(
                self.optimiser, recipe.sched, num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs,
                warmup_lr=recipe.warmup_lr * scale, min_lr=recipe.min_lr * scale,
                cooldown_epochs=recipe.cooldown_epochs, step_on_epochs=False, updates_per_epoch=len(self.batches),
                **recipe.sched_args,
            )
        except (TypeError, ValueError) as error:
            raise LinsightError(f"opt_args or sched_args cannot be used: {error}") from error
        self.ema = ModelEmaV3(self.model, recipe.ema, use_warmup=recipe.ema_warmup) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def _reset_sums(self) -> None:
        self.loss_sum = 0.0
        self.images = 0
        self.train_seconds = self.epoch_seconds = 0.0
        self.bad: list[str] = list(self.lost)
        self.pending: list[tuple[Tensor, int]] = []

    def run_epochs(self) -> dict[str, Any]:
        """From where we are to the summary."""
        self.report.begin(self.epochs, len(self.batches), self.epoch, self.step)
        while self.epoch < self.epochs:
            self._train_epoch()
            self._end_epoch()
        return self._finish()

    def _train_epoch(self) -> None:
        self.batches.epoch, self.batches.start = self.epoch, self.step
        if self.step == len(self.batches):
            return
        self.compiled.train()
        clock = time.perf_counter()
        for batch in self.loader:
            # workers draw in processes of their own, but without workers the batch was drawn here
            seed_step(self.recipe.seed, self.epoch, self.step)
            self._meet_bad(batch.bad)
            self.bad += batch.bad
            self._update(batch)
            self.step += 1
            self._collect(len(batch.targets))
            now = time.perf_counter()
            self.train_seconds += now - clock
            self.epoch_seconds += now - clock
            clock = now
            if self.stop.code:
                self._interrupt()
            if self.recipe.save_every and self.step % self.recipe.save_every == 0:
                self._save()

    def _update(self, batch: Batch) -> None:
        images, targets = self.normalise(batch.images), batch.targets.to(self.device, non_blocking=True)
        if self.mix and len(images) % 2:  # pairs only: skipped images may leave an odd number
            images, targets = images[:-1], targets[:-1]
        if not len(images):
            return
        if self.recipe.re_prob:
            images = self.erase(images)
        count = len(images)
        smoothing = self.recipe.smoothing
        if self.mix:
            images, targets = self.mix(images, targets)
            smoothing = 0.0  # mixed targets have it in them
        done = self.epoch * len(self.batches) + self.step
        if self.schedule is not None:
            self.schedule.step_update(done)
        with autocast(self.device, self.dtype):
            logits = self.compiled(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.recipe.clip_grad:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.pending.append((loss.detach(), count))
        if self.device.type == "cpu":
            self._flush()  # before a loss that is no number reaches the weights
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=done + 1)

    def _collect(self, images: int) -> None:
        if len(self.pending) >= 20:
            self._flush()
        mean = self.loss_sum / self.images if self.images else math.nan
        self.report.step(self.epoch, self.step, images, mean)

    def _flush(self) -> None:
        """Bring losses over from the device: seldom, since a GPU waits for it."""
        for (_, count), loss in zip(self.pending, _values([loss for loss, _ in self.pending]), strict=True):
            if not math.isfinite(loss):
                raise LinsightError(
                    f"the loss became {loss} in epoch {self.epoch + 1}, near step {self.step + 1}: lower lr, or set "
                    f"clip_grad or amp=off; the last good state is in '{self.run.path}'"
                )
            self.loss_sum += loss * count
            self.images += count
        self.pending = []

    def _end_epoch(self) -> None:
        clock = time.perf_counter()
        self._flush()
        if not self.images:
            raise LinsightError(f"no image to train on could be read: {self.bad[0]}")
        model = self.ema.module if self.ema is not None else self.compiled
        scores = score(model, self.val_loader, self.normalise, self.dtype, self._after_val_batch)
        self.epoch_seconds += time.perf_counter() - clock
        bad = self.bad + scores.bad
        row = {
            "epoch": self.epoch + 1,
            "lr": self.optimiser.param_groups[0]["lr"],
            "train_loss": self.loss_sum / self.images,
            "val_loss": scores.loss,
            "top1": scores.top1,
            "top5": scores.top5,
            "images_per_second": round(self.images / max(self.train_seconds, 1e-9), 1),
            "seconds": round(self.epoch_seconds, 3),
            "skipped": len(bad),
        }
        self.seconds += self.epoch_seconds
        if scores.top1 > self.best[0]:
            self.best = (scores.top1, self.epoch + 1)
            weights = self.ema.module if self.ema is not None else self.model
            _model.save(
                self.run.path / _model.WEIGHTS, weights.state_dict(), self.recipe, self.data.classes,
                top1=scores.top1, epoch=self.epoch + 1,
            )
        self.run.record(row)
        self.report.epoch(row, self.epochs)
        if bad:
            self.report.note(f"skipped {len(bad)} unreadable images: {'; '.join(bad[:3])}{' ...' if bad[3:] else ''}")
        self.epoch, self.step = self.epoch + 1, 0
        self._reset_sums()
        self._save()
        if self.stop.code and self.epoch < self.epochs:
            self._interrupt(saved=True)

    def _after_val_batch(self, batch: Batch) -> None:
        self._meet_bad(batch.bad)
        if self.stop.code:
            self._interrupt()

    def _finish(self) -> dict[str, Any]:
        trained = _model.load_trained(self.run.path)
        if self.recipe.figures:
            _figures.curves(self.run.path / "curves.png", self.run.rows)
            self._draw(trained.model.to(self.device))
        best = self.run.rows[self.best[1] - 1]
        summary = {
            "name": self.run.name,
            "model": self.recipe.model,
            "attention": self.recipe.attention,
            "params": self.params,
            "top1": best["top1"],
            "top5": best["top5"],
            "val_loss": best["val_loss"],
            "best_epoch": self.best[1],
            "last_top1": self.run.rows[-1]["top1"],
            "epochs": self.epochs,
            "seconds": round(self.seconds, 2),
            "train_images": len(self.data.train),
            "val_images": len(self.data.val),
            "classes": len(self.data.classes),
            "folder": str(self.run.path),
        }
        self.run.summarise(summary)
        return summary

    def _draw(self, model: nn.Module) -> None:
        """predictions.png: images spread over the evaluation source."""
        count = min(24, len(self.val))
        items = [self.val[0, index * len(self.val) // count] for index in range(count)]
        good = [item for item in items if not isinstance(item, str)]
        if not good:
            return
        images = torch.stack([image for image, _ in good])
        guesses = probabilities(model, images, self.normalise, self.dtype).argmax(-1).tolist()
        names = dict(enumerate(self.data.classes))
        _figures.predictions(
            self.run.path / "predictions.png", images,
            [names.get(guess, str(guess)) for guess in guesses], [names[target] for _, target in good],
        )

    def _meet_bad(self, bad: list[str]) -> None:
        if bad and self.recipe.on_bad_image == "refuse":
            raise LinsightError(f"unreadable image {bad[0]} (on_bad_image=skip leaves such images out)")

    def _interrupt(self, saved: bool = False) -> None:
        if not saved:
            self._save()
        raise Interrupted(
            f"stopped in epoch {min(self.epoch + 1, self.epochs)}; go on with: linsight train --resume {self.run.path}",
            self.stop.code,
        )

    def _save(self) -> None:
        self._flush()
        self.run.save_state({
            "epoch": self.epoch,
            "step": self.step,
            "best": list(self.best),
            "sums": [self.loss_sum, self.images, self.train_seconds, self.epoch_seconds, self.seconds],
            "bad": self.bad,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        })

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        source = str(self.run.path)
        _model.load_state(self.model, state["model"], source)
        if self.ema is not None:
            _model.load_state(self.ema.module, state["ema"], source)
        try:
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"the state in '{source}' is of another optimiser: {error}") from error
        self.epoch, self.step = state["epoch"], state["step"]
        self.best = (state["best"][0], state["best"][1])
        self.loss_sum, self.images, self.train_seconds, self.epoch_seconds, self.seconds = state["sums"]
        self.bad = state["bad"]
        self.report.note(f"going on at epoch {self.epoch + 1}, step {self.step + 1}")


def _values(losses: list[Tensor]) -> list[float]:
    return torch.stack(losses).tolist() if losses else []


def default_workers() -> int:
    """Processes that read images beside the training process, which uses the cores too."""
    cores = os.cpu_count() or 1
    return 1 if cores <= 2 else min(8, cores - 1)
