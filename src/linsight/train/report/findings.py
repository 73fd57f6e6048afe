"""The findings of a run, by its task."""

from collections.abc import Mapping, Sequence
from typing import Any

from linsight.tasks import Shown, Task

from .classes import class_findings
from .look import Outcome
from .page import Findings, number
from .seen import section


def findings_of(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    outcome: Outcome | None,
    shown: Sequence[Shown] = (),
    notes: Sequence[str] = (),
) -> Findings:
    """The findings of a run.

    rows: of metrics.jsonl.  outcome: what the best weights of a classifier see, None where that is not known.
    shown: what its task shows of them.
    """
    classes = task.facts.get("classes")
    if classes and task.sorts:
        return class_findings(rows, tuple(map(str, classes)), outcome, notes, [section(part) for part in shown])
    best, *_ = columns = task.columns
    metrics = {column.key: column.label for column in columns if column.unit == best.unit}
    known = [row for row in rows if number(row.get(best.key)) is not None]
    if not known:
        return Findings("No epoch is done", {}, metrics, (), notes, best.unit)
    row = (min if task.smaller else max)(known, key=lambda row: row[best.key])
    there = [column for column in columns if number(row.get(column.key)) is not None]
    figures = {column.label: column.text(row, unit=True) for column in there}
    headline = f"{best.label}: {best.text(row, unit=True)} on the images that it was not trained on"
    return Findings(headline, figures, metrics, [section(part) for part in shown], notes, best.unit)
