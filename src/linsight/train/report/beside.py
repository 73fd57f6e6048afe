"""A section that puts a run beside others: controls, other mechanisms, the same budget from scratch."""

from collections.abc import Sequence

from linsight.tasks import Column

from .page import Section, isolated, number, paragraph, table
from .run import Kept

_HEAD = ("run", "task", "model", "parameters", "{}", "epochs", "time")


def beside(kept: Kept, others: Sequence[Kept], best: Column) -> Section:
    """A table of `kept` and then `others`, by `best`, the measure of the first one's task."""
    head = tuple(cell.format(best.label) for cell in _HEAD)
    rows = [_row(run, best) for run in (kept, *others)]
    said = "This run first. Figures of other data, or of other images to evaluate on, do not compare."
    return Section("Beside other runs", paragraph(said, "soft") + table(head, rows, numbers=(3, 4, 5, 6)))


def _row(run: Kept, best: Column) -> tuple[object, ...]:
    told, recipe = run.summary, run.recipe
    attention = f" ({recipe['attention']})" if recipe.get("attention") else ""
    reached = number(told.get(best.key))
    count, seconds = number(told.get("params")), number(told.get("seconds"))
    return (
        isolated(run.folder.name, 40),
        isolated(str(recipe.get("task", "classify"))),
        isolated(f"{recipe.get('model')}{attention}", 60),
        "" if count is None else f"{count:,.0f}",
        "not ended" if reached is None else f"{reached:{best.form}} {best.unit}".strip(),
        f"{len(run.rows)}",
        "" if seconds is None else f"{seconds:,.0f} s",
    )
