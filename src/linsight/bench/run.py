"""A whole run: every group at every size, each step in rounds; results as they come."""

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

import linsight
from linsight.errors import LinsightError
from linsight.runtime.device import list_devices, pick_device, pick_dtype

from ._subjects import Group, Subject
from ._worker import Worker
from .roofline import PEAKS
from .rounds import Side
from .rows import Row, new_row, results_folder, step_columns
from .steps import STEPS, Cell, Setting, measure

Size = tuple[int, int, int]  # height, width, batch


@dataclasses.dataclass(frozen=True)
class Plan:
    """The measurements of a run.

    steps: of `STEPS`.  limit: seconds that a side's first steps, or a later sample, may take; else it is given up.
    """

    groups: tuple[Group, ...]
    sizes: tuple[Size, ...]
    setting: Setting
    steps: tuple[str, ...] = tuple(STEPS)
    limit: float = 100.0


class Done(NamedTuple):
    """A cell that was measured: its sides by subject; and all rows so far, with what holds for all of them."""

    cell: Cell
    group: Group
    sides: dict[Subject, Side]
    rows: list[Row]
    facts: dict[str, Any]


def check_plan(plan: Plan) -> Plan:
    """`plan` on a device that is there, by its full name.

    Raises:
        LinsightError: what is asked cannot be done; one line says why.
    """
    setting = plan.setting
    device = pick_device(setting.device)
    dtype, _ = pick_dtype(setting.amp, device)
    operators = any(subject.kind == "operator" for group in plan.groups for subject in group.sides)
    if operators and (setting.heads < 1 or setting.dim < 1 or setting.dim % setting.heads):
        raise LinsightError(f"{setting.heads} heads do not divide a width of {setting.dim}: choose a divisor")
    if setting.fused and (operators or plan.steps != ("infer",)):
        raise LinsightError("fused are whole models, and for inference: name models, and --steps infer")
    if setting.graphs and device.type != "cuda":
        raise LinsightError(f"CUDA graphs need a CUDA device, not {device.type}: leave them out, or choose another")
    if setting.graphs and dtype is torch.float16 and "train" in plan.steps and not operators:
        raise LinsightError("training in fp16 scales its loss, which no CUDA graph can: take bf16, or infer alone")
    return dataclasses.replace(plan, setting=dataclasses.replace(setting, device=str(device)))


def run_facts(setting: Setting) -> dict[str, Any]:
    """Facts that hold for every row of a run: the machine, the precision, versions."""
    device = torch.device(setting.device)
    name = next(row["name"] for row in list_devices() if row["type"] == device.type)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    facts: dict[str, Any] = {"device": f"{device.type}: {name}", "precision": pick_dtype(setting.amp, device)[1]}
    facts |= {"threads": setting.threads, "compiled": setting.compiled, "graphs": setting.graphs}
    facts |= {"fused": setting.fused, "date": date}
    return facts | {"torch": torch.__version__, "timm": timm.__version__, "linsight": linsight.__version__}


def bench(plan: Plan, measure: Callable[..., None] = measure) -> Iterator[Done]:
    """Measure a plan in a process of its own, and yield each cell when it is done.

    `measure` is what runs there, see `Worker`; a failure of whatever kind is a row like the others.

    Raises:
        LinsightError: see `check_plan`.
    """
    plan = check_plan(plan)
    facts: dict[str, Any] = {**run_facts(plan.setting), **dict.fromkeys(PEAKS)}
    rows: dict[tuple[Subject, Subject | None, Size], Row] = {}
    with Worker(measure, plan.limit) as worker:
        (best,) = worker.run(Cell("peaks", 0, 0, 0, plan.setting), ["peaks"])
        facts |= {key: round(best.facts[key], 3) for key in PEAKS if key in best.facts}
        for group in plan.groups:
            for size in plan.sizes:
                for step in plan.steps:
                    cell = Cell(step, *size, plan.setting)
                    sides = dict(zip(group.sides, worker.run(cell, group.sides), strict=True))
                    for subject, side in sides.items():
                        row = rows.setdefault((subject, group.beside, size), new_row(subject, group.beside, cell))
                        beside = None if group.beside in (None, subject) else sides[group.beside]
                        row |= step_columns(cell, side, beside, facts)
                        row["error"] = side.error or row.get("error", "")
                        if "param_count" in side.facts:
                            row["param_count"] = side.facts["param_count"]
                    yield Done(cell, group, sides, list(rows.values()), facts)


def results_file(facts: dict[str, Any]) -> Path:
    """A new name in the folder of this machine's results, which is made if it is not there."""
    folder = results_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LinsightError(f"results cannot be kept in '{folder}': {error.strerror}; set XDG_CACHE_HOME") from None
    device = facts["device"].partition(":")[0]
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return folder / f"{stamp}-{device}.csv"
