"""`write_report`: the page of a run made anew from its folder, whether the run has ended or was stopped."""

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
from .findings import findings_of
from .look import Outcome
from .run import PAGE, read_kept, write_page
from .seen import Watch, seen


def write_report(
    run: str | pathlib.Path,
    *,
    out: str | pathlib.Path | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> pathlib.Path:
    """Write report.html, a page that tells all of a run in one file, and give its path.

    Its best weights look at the images that it was evaluated on once more; where they cannot, the page says why.

    Args:
        run: the folder of a run, which has ended or was stopped.
        out: the file; None: report.html in that folder.
        device: where the model runs.
        workers: processes that read images; None: chosen by the number of cores.

    Raises:
        LinsightError: no run is there, its files are damaged, or the page cannot be written.
    """
    folder = located(run)
    kept = read_kept(folder)
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
    return write_page(kept, findings_of(task, kept.rows, outcome, shown, notes), path)
