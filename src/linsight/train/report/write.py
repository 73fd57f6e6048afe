"""`write_report`: the page of a run made anew from its folder, whether the run has ended or was stopped."""

import dataclasses
import pathlib
from collections.abc import Sequence

from linsight.data.feeds import default_workers
from linsight.data.watched import watched
from linsight.errors import LinsightError
from linsight.runtime.device import pick_device, pick_dtype
from linsight.runtime.files import require_place
from linsight.runtime.places import located
from linsight.tasks import Shown, task_of
from linsight.tasks.building import image_size

from ..model import load_trained
from ..run import WEIGHTS, kept_recipe
from .beside import beside as compared
from .findings import findings_of
from .look import Outcome
from .run import PAGE, read_kept, write_page
from .seen import Watch, section, seen


def write_report(
    run: str | pathlib.Path,
    *,
    out: str | pathlib.Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    beside: Sequence[str | pathlib.Path] = (),
    more: Sequence[Shown] = (),
) -> pathlib.Path:
    """Write report.html, a page that tells all of a run in one file, and give its path.

    Its best weights look at the images that it was evaluated on once more; where they cannot, the page says why.

    Args:
        run: the folder of a run, which has ended or was stopped.
        out: the file; None: report.html in that folder.
        device: where the model runs.
        workers: processes that read images; None: chosen by the number of cores.
        beside: folders of other runs to put beside it, in a table.
        more: parts to add.

    Raises:
        LinsightError: no run is there, its files are damaged, or the page cannot be written.
    """
    folder = located(run)
    kept, others = read_kept(folder), [read_kept(located(other)) for other in beside]
    path = folder / PAGE if out is None else located(out)
    require_place(path)
    recipe = kept_recipe(folder)
    if recipe is None:
        raise LinsightError(f"the recipe of '{folder}' cannot be read: it is of another version, or damaged")
    recipe = recipe.changed(device=device, **({} if workers is None else {"workers": workers}))
    where = pick_device(recipe.device)
    outcome: Outcome | None = None
    notes: list[str] = []
    told = kept.config["data"]
    task = task_of(recipe, {name: told[name] for name in told if name not in ("train", "val")})
    shown: Sequence[Shown] = ()
    if (folder / WEIGHTS).exists():
        try:
            trained = load_trained(folder)
            own = task_of(recipe, trained.task.facts)
            own.begin(where)
            samples = own.samples(own.open_again(), image_size(recipe, trained.model), training=False)
            count = default_workers() if recipe.workers is None else recipe.workers
            dtype, _ = pick_dtype(recipe.amp, where)
            model = trained.model.to(where)
            outcome, shown = seen(own, model, samples, recipe.batch_size, count, dtype, Watch(watched))
        except LinsightError as error:
            notes.append(f"Its images are not shown: {error}")
    findings = findings_of(task, kept.rows, outcome, shown, notes)
    sections = [section(part) for part in more]
    if others:
        sections.insert(0, compared(kept, others, task.columns[0]))
    return write_page(kept, dataclasses.replace(findings, sections=[*sections, *findings.sections]), path)
