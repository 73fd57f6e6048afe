"""Logs of a run that other programs show while it trains: tensorboard, wandb, trackio."""

import contextlib
import importlib
import importlib.util
import json
import pathlib
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from linsight.errors import LinsightError, MissingExtraError, UnknownNameError
from linsight.runtime.files import read_json, to_json, write_json
from linsight.runtime.text import printable

from .progress import Silent
from .run import METRICS, SUMMARY

if TYPE_CHECKING:
    from linsight.tasks import Column

EVERY = 20  # updates from one point of the loss to the next
_PLACES = "track.json"  # in the run folder: the name of the run in a log, and how far each is
_PICTURE = "predictions.png"


class Log(Protocol):
    """A log of one program. It is opened where there is something to write, and goes on where it ended."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by their names, at `step` updates."""

    def picture(self, path: pathlib.Path, step: int) -> None:
        """Write a picture."""

    def close(self) -> None:
        """Write what is still to be written."""


class Tensorboard(Log):
    """A log in the run folder, for `tensorboard --logdir`."""

    def __init__(self, folder: pathlib.Path, name: str, recipe: Mapping[str, Any], new: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        if new:
            text = to_json(recipe, indent=2)
            self.writer.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()))  # code, in Markdown

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Log`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, path: pathlib.Path, step: int) -> None:
        """See `Log`."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """See `Log`."""
        self.writer.close()


class Online(Log):
    """A log of wandb, or of a program with the same functions, under the project `linsight`."""

    def __init__(self, package: str, folder: pathlib.Path, name: str, recipe: Mapping[str, Any], **own: Any) -> None:
        self.module = importlib.import_module(package)
        self.run = self.module.init(project="linsight", name=name, config=dict(recipe), resume="allow", **own)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Log`."""
        self.run.log(dict(values), step=step)

    def picture(self, path: pathlib.Path, step: int) -> None:
        """See `Log`."""
        self.run.log({path.stem: self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        """See `Log`."""
        self.run.finish()


def _wandb(folder: pathlib.Path, name: str, recipe: Mapping[str, Any], new: bool) -> Log:
    return Online("wandb", folder, name, recipe, id=name, dir=str(folder))


def _trackio(folder: pathlib.Path, name: str, recipe: Mapping[str, Any], new: bool) -> Log:
    return Online("trackio", folder, name, recipe)


TRACKERS: Mapping[str, Callable[[pathlib.Path, str, Mapping[str, Any], bool], Log]] = {
    "tensorboard": Tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def tracked(names: str | None, folder: pathlib.Path, recipe: Mapping[str, Any], report: Silent) -> Silent:
    """`report`, and beside it the logs that a recipe's `track` names; only the first of many processes has any.

    Raises:
        LinsightError: no such tracker, or it is not installed.
    """
    given = dict.fromkeys(filter(None, re.split(r"[,\s]+", names or "")))
    for name in given:
        if name not in TRACKERS:
            raise UnknownNameError("tracker (track)", name, TRACKERS)
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            if name == "tensorboard":
                raise MissingExtraError(name, "track", f"track={name}")
            raise LinsightError(f"track={name} needs the package '{name}': pip install {name}")
    return Tracked(list(given), folder, recipe, report) if given else report


class Tracked(Silent):
    """A reporter that tells all to another one, and writes logs.

    A point is written once: a run that goes on passes over the steps that a log has. What fails once training has
    begun is told and left out from there on; it does not end the run.
    """

    def __init__(self, names: list[str], folder: pathlib.Path, recipe: Mapping[str, Any], report: Silent) -> None:
        self.names, self.folder, self.recipe, self.report = names, folder, recipe, report
        self.logs: dict[str, Log] = {}

    def note(self, text: str) -> None:
        """See `Silent`."""
        self.report.note(text)

    def busy(self, text: str) -> None:
        """See `Silent`."""
        self.report.busy(text)

    def step(self, epoch: int, step: int, images: int, loss: float) -> None:
        """See `Silent`."""
        self.report.step(epoch, step, images, loss)

    def begin(self, epochs: int, steps: int, epoch: int, step: int, columns: "Sequence[Column]" = ()) -> None:
        """See `Silent`."""
        self.steps = steps
        self.sums: tuple[int, float, int] = (-1 if step else epoch, 0.0, 0)  # epoch, sum of losses, images
        self._find()
        for name in self.names:
            new = self.places[name][0] < 0
            try:
                self.logs[name] = TRACKERS[name](self.folder, self.name, self.recipe, new)
            except Exception as error:  # of any kind: no account, no network, no room
                raise LinsightError(f"track={name} cannot be used: {_line(error)}") from error
        self._keep()
        self.report.begin(epochs, steps, epoch, step, columns)
        for row in self._rows(epoch):
            self._row(row)

    def update(self, done: int, loss_sum: float, images: int, lr: float) -> None:
        """See `Silent`."""
        self.report.update(done, loss_sum, images, lr)
        epoch = (done - 1) // self.steps
        if epoch != self.sums[0]:  # sums begin anew; those of an epoch that goes on are not of its steps alone
            self.sums = (epoch, 0.0, 0) if self.sums[0] >= 0 else (epoch, loss_sum, images)
        if done % EVERY == 0 and images > self.sums[2]:
            mean = (loss_sum - self.sums[1]) / (images - self.sums[2])
            self.sums = (epoch, loss_sum, images)
            self._write({"step/loss": mean, "step/lr": lr}, done, 0)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """See `Silent`."""
        self.report.epoch(row, epochs)
        self._row(row)

    def end(self) -> None:
        """See `Silent`."""
        self.report.end()
        picture = self.folder / _PICTURE
        ended = picture.exists() and (self.folder / SUMMARY).exists()
        last = max([0, *(place[0] for place in self.places.values())]) if self.logs else 0
        for name in list(self.logs):
            if ended:
                self._try(name, lambda log: log.picture(picture, last))
            self._try(name, lambda log: log.close())
        self.logs = {}

    def _find(self) -> None:
        """Read how the run is called in logs, and the last step and the last epoch that each has."""
        own = re.sub(r"[^\w.-]", "-", self.folder.resolve().name, flags=re.ASCII)[:80]
        self.name = f"{own}-{uuid.uuid4().hex[:8]}"
        self.places = {name: [-1, 0] for name in self.names}
        with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):  # there is none yet, or it is damaged
            kept = read_json(self.folder / _PLACES)
            places = {name: [int(kept[name][0]), int(kept[name][1])] for name in TRACKERS if name in kept}
            self.name, self.places = str(kept["name"]), self.places | places

    def _rows(self, epochs: int) -> list[dict[str, Any]]:
        """The metrics of epochs that were done before: of a run that was tracked from here on, or killed in between."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if epochs and path.exists() else []
        return [row for row in map(json.loads, lines) if row["epoch"] <= epochs]

    def _row(self, row: Mapping[str, Any]) -> None:
        values = {f"epoch/{name}": value for name, value in row.items() if isinstance(value, int | float)}
        self._write(values, row["epoch"] * self.steps, row["epoch"])

    def _write(self, values: Mapping[str, float], step: int, epoch: int) -> None:
        """Write to each log that has neither this step nor, of metrics, this epoch. epoch: 0 for values of a step."""
        for name in list(self.logs):
            place = self.places[name]
            if epoch > place[1] if epoch else step > place[0]:
                place[:] = [max(step, place[0]), max(epoch, place[1])]
                self._keep()  # first: a point that is missing is better than one that is there twice
                self._try(name, lambda log: log.scalars(values, step))

    def _keep(self) -> None:
        with contextlib.suppress(OSError):  # the run itself tells of a full disk
            write_json(self.folder / _PLACES, {"name": self.name, **self.places})

    def _try(self, name: str, act: Callable[[Log], None]) -> None:
        """Let a log act, if it is still there."""
        log = self.logs.get(name)
        if log is None:
            return
        try:
            act(log)
        except Exception as error:  # of any kind, as a connection that is lost
            del self.logs[name]
            self.report.note(f"track={name} is left out from here on: {_line(error)}")


def _line(error: Exception) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])
