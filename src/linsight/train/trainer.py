"""`Trainer`: the epochs of a run, evaluation, what is written when, and how it stops and goes on."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linsight.data.datasets import Data
from linsight.data.feeds import default_workers, open_feeds, refuse
from linsight.data.images import Batch, told
from linsight.data.random import seed_noise, seed_step
from linsight.data.watched import KILLED, watched
from linsight.errors import LinsightError
from linsight.models.bounds import require_bounded
from linsight.runtime.device import pick_dtype
from linsight.runtime.processes import Processes
from linsight.runtime.signals import Interrupted, Stop
from linsight.tasks import Task
from linsight.tasks.building import attention_of, image_size, looks_large
from linsight.tasks.task import in_row

from . import _figures
from .bad_updates import BadUpdates
from .evaluation import answered, score
from .learner import Learner, Part, warmup_epochs
from .model import count_of, left_new, load_trained, save, start_from
from .progress import Silent
from .report import Watch, findings_of, read_kept, seen, write_page
from .run import STATE, WEIGHTS, Run
from .spread import Spread
from .state import require_within

# What a row tells of an epoch beside measures.
_COURSE = ("epoch", "lr", "train_loss", "images_per_second", "seconds", "skipped", "bad_updates")


def told_facts(facts: Mapping[str, Any]) -> str:
    """How many classes there are, and the like."""
    return "".join(f", {len(value)} {name}" for name, value in facts.items() if isinstance(value, list | tuple))


class Trainer:
    """One run in progress, from a saved state, or else from the weights of its recipe."""

    def __init__(
        self,
        run: Run,
        task: Task,
        data: Data,
        report: Silent,
        state: dict[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        recipe = self.recipe = run.recipe
        self.run, self.task, self.data, self.report = run, task, data, report
        processes = self.processes = processes or Processes()
        self.stop = Stop()
        device = processes.device(recipe.device)
        spread = self.spread = Spread(processes, device, recipe.parallel, recipe.image_ranks)
        self.dtype, precision = pick_dtype(recipe.amp, device)
        seed_step(recipe.seed)
        if looks_large(recipe):
            require_bounded(recipe.model, task.build, told="as the recipe describes it")
        task.known = None if state is None else (run.data or {})
        model = task.build()
        spread.check(recipe.batch_size, model)
        new = state.get("new") if state and recipe.init else task.new(model)
        if recipe.init and state is None:
            head = recipe.init_partial or not recipe.freeze  # a linear probe has a new one
            size = recipe.from_size
            with processes.main_first():  # it may have to be fetched
                filled = start_from(model, recipe.init, partial=recipe.init_partial, head=head, from_size=size)
            report.note(str(filled))
            new = left_new(model, filled)
            if new:
                report.note(f"new: {count_of(model, new)}")
        size = image_size(recipe, model)
        with processes.main_first():
            self.feeds = open_feeds(recipe, data, task, size, device, report.note, spread.copy)
            self.steps = len(self.feeds.order)
        self.learner = Learner(task, model, device, self.dtype, updates=self.steps, new=new, spread=spread)
        self.bad_updates = BadUpdates(self.learner)
        if self.learner.kept:
            report.note(f"kept as they are: {self.learner.kept} of {self.learner.params} parameters")
        if note := self.learner.renewal.note:
            report.note(note)
        warmup, asked = warmup_epochs(recipe, self.steps), recipe.warmup_updates or recipe.warmup_epochs
        if warmup not in (recipe.warmup_epochs, recipe.warmup_updates / self.steps):
            what, unit = ("updates", " epochs") if recipe.warmup_updates else ("epochs", "")
            report.note(f"a warm-up of {asked} {what} would take all {recipe.epochs}{unit}: it is {warmup:g} of them")
        self.epoch = self.step = 0
        self.notes, self.told = list[str](), False
        self.best: tuple[float, int] = (-1.0, 0)  # the measure, and its epoch; 0: none yet
        self.seconds = 0.0
        self._reset_sums()
        # the folder appears once everything is known to be good
        run.describe({"train": len(data.train), "val": len(data.val), **task.facts})
        self.attention = attention_of(recipe, model)
        some = recipe.epoch_images not in (None, len(data.train))
        an_epoch = f", {recipe.epoch_images} an epoch" if some else ""
        report.note(
            f"{recipe.model}{self.attention and f' ({self.attention})'}, {self.learner.params / 1e6:.2f} M parameters, "
            f"{size[0]}x{size[1]}; {len(data.train)} images to train on{an_epoch}, {len(data.val)} to evaluate"
            f"{told_facts(task.facts)}; {spread.about}{device}, {precision}; folder {run.path}"
        )
        if state is not None:
            self._load(state)

    def _reset_sums(self) -> None:
        self.loss_sum = 0.0
        self.images = 0
        self.train_seconds = self.epoch_seconds = 0.0
        self.bad: list[str] = []
        self.pending: list[tuple[Tensor, int]] = []

    def run_epochs(self, stop: Stop) -> dict[str, Any]:
        """From where we are to the summary, or to where `stop` says so."""
        self.stop = stop
        epochs = self.learner.epochs
        self.report.begin(epochs, self.steps, self.epoch, self.step, self.task.columns)
        while self.epoch < epochs:
            self._train_epoch()
            self._end_epoch()
            if self.stop.code and self.epoch < epochs:
                self._interrupt()
        return self._finish()

    def _train_epoch(self) -> None:
        self.feeds.order.epoch, self.feeds.order.start = self.epoch, self.step
        if self.step == self.steps:
            return
        clock = time.perf_counter()
        for batch in self._watched(self.feeds.train):
            refuse(self.recipe, batch.bad)
            self.bad += batch.bad
            self.notes += batch.notes
            images = self._update(batch)
            self.step += 1
            mean = self.loss_sum / self.images if self.images else math.nan
            self.report.step(self.epoch, self.step, images * self.spread.copy.world, mean)
            self.report.update(self.epoch * self.steps + self.step, self.loss_sum, self.images, self.learner.lr)
            now = time.perf_counter()
            self.train_seconds += now - clock
            self.epoch_seconds += now - clock
            clock = now
            if self._asked():
                self._save()
                self._interrupt()
            if self.recipe.save_every and self.step % self.recipe.save_every == 0:
                self._save()

    def _watched(self, feed: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of `feed`; where a process that reads them is killed, the end of the run is one line."""
        return watched(feed, f"{KILLED}; {self.run.way()}", self._stop_alone)

    def _stop_alone(self) -> None:
        """Stop as asked, where no others have to be told."""
        if self.stop.code and self.processes.copy.world == 1:
            self._save()
            self._interrupt()

    def _asked(self) -> bool:
        """True where a process, all of which ask here, was asked to stop."""
        told = self.processes.tell(self.stop.code)
        self.stop.code = self.stop.code or max(code for (code,) in told)
        return bool(self.stop.code)

    def _update(self, batch: Batch) -> int:
        """Learn from a batch; the number of its images, in this process."""
        learner, images = self.learner, 0
        loss: Tensor | None = None
        self.bad_updates.begin()
        for part in learner.parts(batch):
            learner.renew(part, self.epoch, self.step, self.epoch * self.steps + self.step)
            with learner.adding(part):
                again = functools.partial(self._loss, part)
                loss = again()
                if self.bad_updates.looks(loss) and self._anywhere(not math.isfinite(loss.item())):
                    self._leave_out(loss.item(), again)
                    return 0
                self.pending.append((loss.detach(), part.images))
                # a GPU would wait for each reading of a loss; on the CPU, none that is no number reaches the weights
                if loss.device.type == "cpu" or len(self.pending) == 20:
                    self._flush()
                learner.backward(loss * part.share if part.share != 1 else loss)
            images += part.images
        if loss is None:
            return 0
        where = self.bad_updates.gradient(loss)
        if self.bad_updates.looks(loss) and self._anywhere(bool(where)):
            self._leave_out(math.nan, None, where)
            return 0
        learner.step(self.epoch * self.steps + self.step)
        self.bad_updates.done()
        return images

    def _loss(self, part: Part) -> Tensor:
        """The loss of a part of the batch, which is the same however often it is computed."""
        # after the batch: without worker processes, it was drawn from the generators of this one
        seed_step(self.recipe.seed, self.epoch, self.step)
        if part.number:  # images are mixed alike in all parts of a batch, while a model's noise is another
            seed_noise(self.recipe.seed, self.epoch, self.step, part.number)
        found = self.learner.loss(part.batch, self.epoch)
        assert found is not None, "it has images"
        return found[0]

    def _anywhere(self, bad: bool) -> bool:
        """True where it is so in any process; all of them ask."""
        return any(found for (found,) in self.processes.tell(bad))

    def _leave_out(self, loss: float, again: Callable[[], Any] | None, where: str = "") -> None:
        """Leave this update out, where that is asked for, or end the run."""
        if not self.bad_updates.leave_out(where):
            self._refuse_loss(loss, where or self.bad_updates.origin(again))

    def _flush(self) -> None:
        """Bring losses over from the device."""
        losses = torch.stack([loss for loss, _ in self.pending]).tolist() if self.pending else []
        for (_, count), loss in zip(self.pending, losses, strict=True):
            self._require_finite(loss)
            self.loss_sum += loss * count
            self.images += count
        self.pending = []

    def _collect(self) -> None:
        """Bring the sums of all processes to the main one."""
        self._flush()
        found = self.spread.gather((self.loss_sum, self.images, self.bad, self.notes))
        if not self.processes.main:
            found = [(0.0, 0, [], [])]
        self.loss_sum, self.images = sum(loss for loss, *_ in found), sum(images for _, images, *_ in found)
        self.bad = [line for *_, bad, _ in found for line in bad]
        self.notes = [note for *_, notes in found for note in notes]

    def _together(self, feed: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of `feed` to evaluate on, of which other processes may have more; stops where that was asked."""
        batches = iter(self._watched(feed))
        while True:
            batch = next(batches, None)
            images = 0 if batch is None else len(batch.images)
            told = self.processes.tell(batch is not None, images, self.stop.code)
            self.stop.code = self.stop.code or max(code for *_, code in told)
            if self.stop.code:
                self._save()
                self._interrupt()
            if not any(more for more, *_ in told):
                return
            if not images and any(others for _, others, _ in told):
                self.learner.idle()
            if batch is not None:
                yield batch

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._bad_loss(loss, self.bad_updates.origin(None))

    def _refuse_loss(self, loss: float, where: str) -> None:
        """End the run, in all processes, for what one of them has found."""
        found = self.processes.gather((loss, where))
        raise self._bad_loss(*next((entry for entry in found if not math.isfinite(entry[0])), found[0]))

    def _bad_loss(self, loss: float, where: str) -> LinsightError:
        return LinsightError(
            f"the loss became {loss} in epoch {self.epoch + 1}, near step {self.step + 1}: "
            f"{self.bad_updates.words(where)}; {self.run.last_good()}"
        )

    def _end_epoch(self) -> None:
        clock = time.perf_counter()
        self._collect()
        if self.bad_updates.counts[0] >= self.steps:  # nothing was learned
            self._refuse_loss(math.nan, self.bad_updates.where or self.bad_updates.origin(None))
        if self.processes.main and not self.images:
            raise LinsightError(f"no image to train on could be read: {self.bad[0]}")
        learner, feed = self.learner, self._together(self.feeds.val)
        scores = score(self.task, learner.scored, feed, self.dtype, self.after_val_batch, gather=self.spread.gather)
        for value in scores.measures.values():
            self._require_finite(value)
        self.epoch_seconds += time.perf_counter() - clock
        self.seconds += self.epoch_seconds
        bad = self.bad + scores.bad
        row = {
            "epoch": self.epoch + 1,
            "lr": learner.lr,
            "train_loss": self.loss_sum / max(self.images, 1),
            **{in_row(name): value for name, value in scores.measures.items()},
            "images_per_second": round(self.images / max(self.train_seconds, 1e-9), 1),
            "seconds": round(self.epoch_seconds, 3),
            "skipped": len(bad),
            **self.bad_updates.row(),
        }
        measure = scores.measures[self.task.best]
        better = measure < self.best[0] if self.task.smaller else measure > self.best[0]
        if better or not self.best[1]:
            self.best = (measure, self.epoch + 1)
            about = {self.task.best: measure, "epoch": self.epoch + 1}
            weights = learner.weights()
            if self.processes.main:
                save(self.run.path / WEIGHTS, weights, self.recipe, {**self.task.facts, **about})
        self.run.record(self.processes.share(row))
        self.epoch, self.step = self.epoch + 1, 0
        self._reset_sums()
        self._save()  # before it is told: who listens may be gone
        self.report.epoch(row, learner.epochs)
        for line in [] if self.told else told(self.notes):
            self.report.note(line)
        self.notes, self.told = [], True  # the images are the same in every epoch
        if bad:
            self.report.note(f"skipped {len(bad)} unreadable images: {'; '.join(bad[:3])}{' ...' if bad[3:] else ''}")

    def after_val_batch(self, batch: Batch) -> None:
        """Refuse a bad image where those are refused."""
        refuse(self.recipe, batch.bad)
        self.notes += batch.notes

    def _interrupt(self) -> None:
        raise Interrupted(
            f"stopped in epoch {self.epoch + 1}, after {self.step} of {self.steps} steps; {self.run.way()}",
            self.stop.code,
        )

    def _finish(self) -> dict[str, Any]:
        return self.processes.share(self._write_end() if self.processes.main else {})

    def _write_end(self) -> dict[str, Any]:
        rows, best = self.run.rows, self.run.rows[self.best[1] - 1]
        if self.recipe.figures:
            _figures.curves(self.run.path / "curves.png", rows, self.task.columns)
            self._draw(load_trained(self.run.path).model.to(self.learner.device))
        summary = {
            "name": self.run.name,
            "model": self.recipe.model,
            "attention": self.attention,
            "params": self.learner.params,
            "task": self.task.name,
            **{name: value for name, value in best.items() if name not in _COURSE},
            "best_epoch": self.best[1],
            f"last_{in_row(self.task.best)}": rows[-1][in_row(self.task.best)],
            "epochs": self.learner.epochs,
            "seconds": round(self.seconds, 2),
            "train_images": len(self.data.train),
            "val_images": len(self.data.val),
            **{name: len(value) for name, value in self.task.facts.items() if isinstance(value, list | tuple)},
            "folder": str(self.run.path),
        }
        if self.recipe.report:
            self._tell(summary)
        self.run.summarise(summary)
        return summary

    def _tell(self, summary: dict[str, Any]) -> None:
        """report.html: what the best weights see of all images that they were evaluated on."""
        workers = default_workers() if self.recipe.workers is None else self.recipe.workers
        model, size = load_trained(self.run.path).model.to(self.learner.device), self.recipe.batch_size
        watch = Watch(self._watched, self.after_val_batch)
        outcome, shown = seen(self.task, model, self.feeds.val_samples, size, workers, self.dtype, watch)
        kept = dataclasses.replace(read_kept(self.run.path), summary=summary)
        write_page(kept, findings_of(self.task, self.run.rows, outcome, shown))

    def _draw(self, model: nn.Module) -> None:
        """predictions.png: images spread over the evaluation source."""

        def answers(batch: Batch) -> Any:
            return answered(self.task, model, batch, self.dtype)

        self.task.draw(self.run.path / "predictions.png", self.feeds.val_samples, answers)

    def _save(self) -> None:
        self._collect()
        places = [place for place in self.processes.gather(self.feeds.order.place) if place]
        lanes = {lane: at for place in places for lane, at in place["lanes"].items()}
        self.run.save_state(
            {
                "epoch": self.epoch,
                "step": self.step,
                "best": list(self.best),
                "sums": [self.loss_sum, self.images, self.train_seconds, self.epoch_seconds, self.seconds],
                "bad": self.bad,
                "place": {**places[0], "lanes": lanes} if places else None,
                "bad_updates": self.bad_updates.counts,
                **self.learner.state(),
            }
        )

    def _load(self, state: dict[str, Any]) -> None:
        require_within(state, self.learner.epochs, self.steps, self.run.path / STATE)
        self.learner.load(state, str(self.run.path))
        self.epoch, self.step = state["epoch"], state["step"]
        self.best = (state["best"][0], state["best"][1])
        self.loss_sum, self.images, self.train_seconds, self.epoch_seconds, self.seconds = state["sums"]
        self.bad, self.bad_updates.counts = state["bad"], state.get("bad_updates", [0, 0])
        if not self.processes.main:  # it counts for all
            self.loss_sum, self.images, self.bad = 0.0, 0, []
        self.feeds.order.place = state.get("place")
        self.report.note(f"going on at epoch {self.epoch + 1}, step {self.step + 1}")
