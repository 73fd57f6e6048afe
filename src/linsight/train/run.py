"""The run folder: configuration, metrics, state, best weights. Each file is whole at any moment."""

import datetime
import json
import os
import pathlib
import platform
import shutil
import sys
import weakref
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision

import linsight
from linsight.errors import CheckpointError, LinsightError
from linsight.recipe import Recipe, require_known
from linsight.records import shown
from linsight.runtime.files import (
    hold,
    leftovers,
    read_json,
    remove_leftovers,
    replacing,
    require_folder,
    sync,
    to_json,
    write_json,
    write_text,
    writing,
)
from linsight.runtime.machine import describe_machine
from linsight.runtime.places import located
from linsight.runtime.processes import Processes
from linsight.tasks import read_recipe

from .config import read_config, read_summary
from .state import read_rows, read_state

CONFIG, METRICS, STATE, SUMMARY = "config.json", "metrics.jsonl", "state.pt", "summary.json"
WEIGHTS = "best.safetensors"
LOCK = ".linsight-lock"
_WRITTEN = (CONFIG, METRICS, STATE, SUMMARY, WEIGHTS)  # while the folder is held


class Run:
    """The folder of a run, held by it alone until `close`. Make one with `start` or `resume`."""

    def __init__(self, path: pathlib.Path, name: str, recipe: Recipe, data: dict[str, Any] | None) -> None:
        self.path, self.name, self.recipe, self.data = path, name, recipe, data
        self.rows: list[dict[str, Any]] = []
        self.threads = recipe.threads
        self.notes: list[str] = []  # what a user should hear of the folder
        self._place: tuple[int, int] | None = None  # of the last state: epoch and step
        self._release: Callable[[], Any] | None = None

    @classmethod
    def start(cls, recipe: Recipe, out: str | pathlib.Path | None, name: str) -> "Run":
        """A new run; its folder is made when there is something to write. Refuses a folder with content."""
        if out is None:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            tries = (pathlib.Path("runs", f"{name}-{stamp}{f'-{n}' if n else ''}") for n in range(1000))
            path = next(path for path in tries if not path.exists())
        else:
            path = located(out)
        cls._check_new(path)
        return cls(path, name, recipe, None)

    @classmethod
    def take_up(cls, recipe: Recipe, out: str | pathlib.Path, name: str) -> "Run":
        """The run of `recipe` in the folder `out`, where there is one, else a new one.

        Raises:
            LinsightError: it is of another recipe, in what its result depends on.
        """
        path = located(out)
        if not (path / CONFIG).exists():
            return cls.start(recipe, path, name)
        before = kept_recipe(path)
        if before is None:
            return cls.resume(path, {})  # which tells what is wrong with it
        fields = [
            field for field in type(recipe).model_fields if getattr(recipe, field) != getattr(before, field, None)
        ]
        other = [field for field in fields if field not in recipe.RESUMABLE]
        if other:
            now, then = (shown(getattr(one, other[0], None)) for one in (recipe, before))
            raise LinsightError(
                f"the run in '{path}' is of another recipe ({other[0]}: {then} there, {now} here): give another --out, "
                f"or go on with it as it is by --resume {path}"
            )
        changes = {field: getattr(recipe, field) for field in fields if getattr(recipe, field) is not None}
        return cls.resume(path, changes)

    @staticmethod
    def _check_new(path: pathlib.Path) -> None:
        require_folder(path)
        if path.is_dir() and set(path.iterdir()) - {path / LOCK, *leftovers(path, _WRITTEN)}:
            raise LinsightError(f"'{path}' exists and is not empty: go on with --resume {path}, or give another --out")

    @classmethod
    def resume(cls, path: str | pathlib.Path, overrides: dict[str, Any]) -> "Run":
        """The run in a folder, with its own recipe; only what its result does not depend on may change."""
        path = located(path)
        if not (path / CONFIG).exists():
            raise LinsightError(f"'{path}' is no run folder: it has no {CONFIG}")
        name, recipe, data, threads = read_config(path / CONFIG)
        for field in overrides:
            recipe.field(field)
            if field not in recipe.RESUMABLE:
                may = ", ".join(sorted(recipe.RESUMABLE))
                raise LinsightError(f"a resumed run keeps its {field}; what may change: {may}")
        recipe = recipe.changed(**overrides)
        require_known(recipe)
        run = cls(path, name, recipe, data)
        if not run.finished:
            run._hold()
        if "threads" not in overrides:  # sums over another number of threads round differently
            run.threads = threads
        return run

    @property
    def finished(self) -> bool:
        """True where the run has come to its end."""
        return (self.path / SUMMARY).exists()

    def describe(self, data: dict[str, Any]) -> None:
        """Write the configuration of a new run; check that a resumed one still has the same data."""
        if self.data is not None:
            for key, value in json.loads(to_json(data)).items():
                if self.data.get(key) != value:
                    raise LinsightError(f"the data of '{self.path}' has changed ({key}): it cannot be resumed")
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        self._check_new(self.path)  # another run may have begun and ended there since `start`
        config = {
            "name": self.name,
            "recipe": self.recipe.values(),
            "data": data,
            "threads": torch.get_num_threads(),
            "machine": describe_machine(),
            "versions": {
                "linsight": linsight.__version__,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
            "command": sys.argv,
        }
        with writing(self.path / CONFIG):
            write_json(self.path / CONFIG, config)
        self.data = data

    def _hold(self) -> None:
        self._release = weakref.finalize(self, hold(self.path, LOCK))
        remove_leftovers(self.path, _WRITTEN)

    def set_threads(self) -> None:
        """Compute with as many threads as the run has; a LinsightError where they are far more than there are cores.

        OpenMP ends the process, without a word of ours, where the system has no room for a thread.
        """
        most = max(256, 4 * (os.cpu_count() or 1))
        if self.threads and self.threads > most:
            raise LinsightError(f"threads={self.threads} are too many for this machine: {most} at most (--threads)")
        if self.threads:
            torch.set_num_threads(self.threads)

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._release is not None:
            self._release()

    def way(self) -> str:
        """How to go on with the run, after whatever ended it."""
        return "nothing was written" if self.data is None else f"go on with: linsight train --resume {self.path}"

    def record(self, row: dict[str, Any]) -> None:
        """Add the metrics of an epoch."""
        self.rows.append(row)
        with writing(self.path / METRICS):
            write_text(self.path / METRICS, "".join(to_json(entry) + "\n" for entry in self.rows))

    def summarise(self, summary: dict[str, Any]) -> None:
        """Write the summary: the run is finished."""
        with writing(self.path / SUMMARY):
            write_json(self.path / SUMMARY, summary)

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run."""
        return read_summary(self.path / SUMMARY, self.recipe)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write all that it takes to go on."""
        path = self.path / STATE
        with writing(path), replacing(path) as temporary:
            with temporary.open("wb") as file:  # torch itself would not say why it cannot write
                torch.save(state, file)
            sync(temporary)
            if self.recipe.keep_states > 1:
                self._set_aside(path)
        self._place = state["epoch"], state["step"]

    def _set_aside(self, path: pathlib.Path) -> None:
        """Keep the state in `path`, which is about to be replaced, under a name of its own; forget the oldest."""
        if path.exists() and self._place is not None:
            older = path.with_name("state-{:05}-{:07}.pt".format(*self._place))
            older.unlink(missing_ok=True)
            try:
                os.link(path, older)
            except OSError:  # of a file system without links, as on memory cards
                shutil.copyfile(path, older)
        for old in self.older()[self.recipe.keep_states - 1 :]:
            old.unlink(missing_ok=True)

    def last_good(self) -> str:
        """Where the last state is, in words."""
        there = (self.path / STATE).exists()
        return f"the last good state is in '{self.path}'" if there else "no state was saved yet"

    def older(self) -> list[pathlib.Path]:
        """The files of states before the last one, the newest first."""
        return sorted(self.path.glob("state-*-*.pt"), reverse=True)

    def load_state(self) -> dict[str, Any] | None:
        """The state that `save_state` wrote last, None if nothing yet. Metrics that it does not cover are forgotten.

        Where the file is damaged, as by a disk, it is the newest of those before it that were kept.
        """
        paths = [path for path in (self.path / STATE, *self.older()) if path.exists()]
        for number, path in enumerate(paths):
            try:
                state = read_state(path)
            except CheckpointError as error:
                if path == paths[-1]:
                    raise
                self.notes.append(f"{error}; going on from '{paths[number + 1].name}'")
                continue
            self.rows = read_rows(self.path / METRICS, state["epoch"], self.recipe)
            self._place = state["epoch"], state["step"]
            return state
        return None


def shared(run: Run | None, processes: Processes) -> Run:
    """The run that the main process has opened, as each process sees it: the main one writes its files."""
    told = None if run is None else (run.path, run.name, run.recipe.values(), run.data, run.finished)
    path, name, values, data, finished = processes.share(told)  # type: ignore[misc]
    return run or Followed(path, name, read_recipe(values), data, finished)


class Followed(Run):
    """The folder of a run for a process that leaves the writing to another one."""

    def __init__(
        self, path: pathlib.Path, name: str, recipe: Recipe, data: dict[str, Any] | None, finished: bool
    ) -> None:
        super().__init__(path, name, recipe, data)
        self._finished = finished

    @property
    def finished(self) -> bool:
        """See `Run`."""
        return self._finished

    def describe(self, data: dict[str, Any]) -> None:
        """See `Run`."""
        self.data = data

    def record(self, row: dict[str, Any]) -> None:
        """See `Run`."""
        self.rows.append(row)

    def summarise(self, summary: dict[str, Any]) -> None:
        """See `Run`."""

    def save_state(self, state: dict[str, Any]) -> None:
        """See `Run`."""

    def load_state(self) -> dict[str, Any] | None:
        """See `Run`."""
        return None


def kept_recipe(folder: pathlib.Path) -> Recipe | None:
    """The recipe of the run in `folder`, None where no run of ours is there."""
    try:
        return read_recipe(read_json(folder / CONFIG)["recipe"])
    except (ValueError, KeyError, TypeError, AttributeError):  # of another program, perhaps
        return None
