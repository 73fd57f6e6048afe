"""The course of a run: its folder, its processes, how it stops and goes on."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from linsight.errors import LinsightError
from linsight.recipe import Recipe, require_known
from linsight.runtime.device import is_out_of_memory, repeatable
from linsight.runtime.figures import require_matplotlib
from linsight.runtime.heap import kept_memory
from linsight.runtime.processes import Processes, joined
from linsight.runtime.signals import Interrupted, Stop, Unwinding, exit_code
from linsight.tasks import Column, read_recipe, task_of

from .progress import Silent
from .run import Run, kept_recipe, shared
from .trackers import tracked
from .trainer import Trainer


def train(
    recipe: Recipe,
    *,
    out: str | pathlib.Path | None = None,
    name: str = "run",
    report: Silent | None = None,
    go_on: bool = False,
) -> dict[str, Any]:
    """Train by a recipe into a new run folder, `runs/<name>-<time>` unless told; the run's summary.

    Under torchrun, `accelerate launch` or srun, all processes make the one run. go_on: take up the run in the folder
    `out`, where there is one of this recipe; of one that is finished, the summary.

    Raises:
        LinsightError: the data, the model or the folder cannot be used, or the loss is no longer a number.
        Interrupted: SIGINT, SIGTERM or SIGHUP; the state is saved, once there is one.
    """
    recipe = read_recipe(recipe.values())
    require_known(recipe)
    if go_on and out is None:
        raise LinsightError("a run is taken up in its folder: give out, the same each time")

    def open_run() -> Run:
        return Run.take_up(recipe, out, name) if go_on and out is not None else Run.start(recipe, out, name)

    return _make(open_run, recipe.device, report or Silent())


def resume(
    path: str | pathlib.Path, *, overrides: dict[str, Any] | None = None, report: Silent | None = None
) -> dict[str, Any]:
    """Take a stopped run to its end: on the CPU bit for bit the one that it would have been.

    It goes on with as many threads as it started with, since sums over others round differently.
    Only fields that the result does not depend on may be overridden (device, workers, save_every ...).
    """
    kept = kept_recipe(pathlib.Path(path))
    device = (overrides or {}).get("device") or (kept.device if kept is not None else "auto")
    return _make(lambda: Run.resume(path, overrides or {}), device, report or Silent())


def _make(open_run: Callable[[], Run], device: str, report: Silent) -> dict[str, Any]:
    """Make a run with all processes that were started for it, of which the main one opens its folder and tells."""
    with joined(device) as processes:
        run = shared(open_run() if processes.main else None, processes)
        try:
            return _go(run, processes, report if processes.main else Silent())
        finally:
            run.close()


def _go(run: Run, processes: Processes, report: Silent) -> dict[str, Any]:
    if run.finished:
        summary = processes.share(run.summary() if processes.main else {})
        report.note(f"the run in '{run.path}' is finished")
        return summary
    try:
        if processes.main:
            report = tracked(run.recipe.track, run.path, run.recipe.values(), report)
        with Unwinding(), repeatable(run.recipe.deterministic):
            return _run(run, processes, report)
    except KeyboardInterrupt as stopped:
        raise Interrupted(f"stopped at once; {run.way()}", exit_code(stopped)) from None
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            line = f"out of memory with batch_size={run.recipe.batch_size}: set it lower, or grad_checkpointing"
        elif (lost := processes.lost(error)) is not None:
            line = str(lost)
        else:
            raise
        raise LinsightError(f"{line}; {run.way()}") from error
    finally:
        report.end()


def _run(run: Run, processes: Processes, report: Silent) -> dict[str, Any]:
    if run.recipe.figures:
        require_matplotlib("drawing curves.png and predictions.png (--no-figures goes without)")
    # of several processes, each has its share of the cores, as its launcher says
    if processes.copy.world == 1 or run.recipe.threads:
        run.set_threads()
    report.busy("reading what data there is")
    task = task_of(run.recipe)
    with processes.main_first():
        data = task.open()
    for note in data.notes:
        report.note(note)
    report.busy("building the model")
    state = run.load_state()
    for note in run.notes:
        report.note(note)
    state, run.rows = processes.share((state, run.rows))
    on_cpu = processes.device(run.recipe.device).type == "cpu"
    with kept_memory() if on_cpu else contextlib.nullcontext():
        trainer = Trainer(run, task, data, report, state, processes)
        with Stop() as stop:
            return trainer.run_epochs(stop)


def columns_of(summary: Mapping[str, Any]) -> Sequence[Column]:
    """The measures that people are shown of a finished run, the one that decided first."""
    facts = {"classes": tuple(map(str, range(summary.get("classes", 0))))}
    return task_of(read_recipe({"task": summary.get("task", "classify")}), facts).columns
