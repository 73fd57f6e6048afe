"""Evaluation of a model with exits for a budget: a table, exits.json, exits.csv and exits.png."""

import csv
import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from linsight.data.feeds import refuse
from linsight.data.random import hold_out
from linsight.data.watched import watched
from linsight.errors import LinsightError
from linsight.runtime.figures import require_matplotlib
from linsight.runtime.files import require_folder, write_json, write_text, writing
from linsight.runtime.finite import require_finite
from linsight.runtime.places import located
from linsight.tasks.budget import Budget, require_exits
from linsight.tasks.building import image_size
from linsight.tasks.exits import Scored, Setting, choose, curve
from linsight.tasks.meters import Exits

from ._figures import exits as draw
from .evaluation import prepare, score
from .model import Trained

_JSON, _CSV, _PNG = "exits.json", "exits.csv", "exits.png"


def evaluate_exits(
    trained: Trained,
    budget: float | None = None,
    *,
    data: str | None = None,
    split: str | None = None,
    batch_size: int = 128,
    device: str = "auto",
    amp: str = "auto",
    workers: int | None = None,
    on_bad_image: str = "skip",
    data_dir: str | None = None,
    fill: float | None = None,
    img_size: Any = None,
    out: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """Accuracy against mean operations, of all settings and of the best one for `budget` G multiply-adds an image.

    Half of the images of each class set the thresholds and choose; the other half is reported on. Writes exits.json,
    exits.csv and exits.png into `out`, by default the folder of the run.

    Raises:
        LinsightError: a model without exits, a budget that no exit meets, or what `evaluate` raises.
    """
    model: Any = trained.model
    require_exits(model, trained.recipe.model)
    folder = located(out) if out is not None else trained.path.parent if trained.run else pathlib.Path()
    require_folder(folder)
    require_matplotlib(f"drawing {_PNG}")
    asked = (data, split, batch_size, device, amp, workers, on_bad_image, data_dir, fill, img_size)
    given = prepare(trained, *asked, make=Budget)
    recipe, meter = given.task.recipe, Exits()
    feed = watched(given.feed)
    bad = score(given.task, given.model, feed, given.dtype, lambda batch: refuse(recipe, batch.bad), meter).bad
    scored, targets = meter.scored()
    require_finite(scored.confidences, f"images of '{recipe.data}'")
    first, second = (torch.tensor(part, dtype=torch.long) for part in hold_out(targets, 0.5))
    if not (len(first) and len(second)):
        raise LinsightError(f"'{recipe.data}' has too few images to calibrate on some and report on others")
    size = image_size(recipe, model)
    settings, alone = curve(
        Scored(*(part[first] for part in scored)),
        Scored(*(part[second] for part in scored)),
        lambda numbers: model.exit_costs(size, numbers),
    )
    chosen = None if budget is None else choose([*settings, *alone], budget)
    result = {
        "model": recipe.model,
        "data": recipe.data,
        "img_size": list(size),
        "images": {"calibration": len(first), "report": len(second), "skipped": len(bad)},
        "budget": budget,
        "chosen": None if chosen is None else shown(chosen),
        "exits": [shown(setting) for setting in alone],
        "settings": [shown(setting) for setting in settings],
        "device": str(given.task.inputs.device),
        "precision": given.precision,
        "bad": bad,
    }
    result["files"] = [str(folder / name) for name in (_JSON, _CSV, _PNG)]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _CSV, _csv([*alone, *settings]))
        draw(folder / _PNG, result)
        write_json(folder / _JSON, result)
    return result


def shown(setting: Setting) -> dict[str, Any]:
    """A setting for JSON, which has no infinity: an exit that is passed by has no threshold."""
    return {
        "setting": setting.name,
        "thresholds": [None if math.isinf(least) else least for least in setting.thresholds],
        "shares": list(setting.report.shares),
        "gmacs": setting.report.gmacs,
        "top1": setting.report.top1,
        "calibration": {"gmacs": setting.calibration.gmacs, "top1": setting.calibration.top1},
    }


def _csv(settings: Sequence[Setting]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    exits = range(1, len(settings[0].report.shares) + 1)
    thresholds, shares = ([f"{what}{k}" for k in exits] for what in ("threshold", "share"))
    writer.writerow(["setting", *thresholds[:-1], *shares, "gmacs", "top1", "calibration_gmacs", "calibration_top1"])
    for name, levels, calibration, report in settings:
        least = ["" if math.isinf(level) else level for level in levels]
        writer.writerow([name, *least, *report.shares, report.gmacs, report.top1, calibration.gmacs, calibration.top1])
    return text.getvalue()
