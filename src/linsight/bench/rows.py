"""Results as rows, of one thing at one size: a CSV file with timm's names of columns where timm has one."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from linsight.errors import LinsightError
from linsight.runtime.files import replacing, user_cache

from ._subjects import Subject
from .roofline import PEAKS, roofline
from .rounds import Side
from .steps import STEPS, Cell

Row = dict[str, Any]
# Columns: of what is measured, of each of its steps, and what holds for a whole run.
WHAT = ("kind", "model", "beside", "error", "param_count", "tokens", "dim", "heads")
STEP = (
    *("samples_per_sec", "step_time", "step_time_min", "step_time_max", "batch_size", "img_size", "gmacs"),
    *("peak_mb", "gbytes", "roofline", "bound", "form", "rounds", "ratio", "ratio_min", "ratio_max", "error"),
)
FACTS = ("device", "precision", "threads", "compiled", "graphs", "fused", "date", "torch", "timm", "linsight", *PEAKS)
COLUMNS = (*WHAT, *(f"{step}_{key}" for step in STEPS for key in STEP), *FACTS)
PATCH = 16  # pixels of a patch's side, to tell the tokens of an image


def ratios(side: Side, beside: Side) -> list[float]:
    """Ratios of times, one for each round that both have done."""
    return [a / b for a, b in zip(side.times, beside.times, strict=False)]


def spread(values: Sequence[float], form: str = "") -> str:
    """`median (lowest..highest)`; without a `form`, as `digits`."""
    low, middle, high = (digits(pick(values), form) for pick in (min, statistics.median, max))
    return f"{middle} ({low}..{high})"


def digits(value: float, form: str = "") -> str:
    """A number in `form`; without one, with three digits at least, and no exponent where it is large."""
    return format(value, form or (".0f" if abs(value) >= 100 else ".3g"))


def show_size(height: int, width: int) -> int | str:
    """A side, or `HEIGHTxWIDTH`."""
    return height if height == width else f"{height}x{width}"


def new_row(subject: Subject, beside: Subject | None, cell: Cell) -> Row:
    """A row with what is known before anything is measured."""
    operator = subject.kind == "operator"
    grid = (cell.height, cell.width) if operator else (-(-cell.height // PATCH), -(-cell.width // PATCH))
    row = {"kind": subject.kind, "model": subject.label, "tokens": grid[0] * grid[1]}
    row |= {"beside": beside.label if beside and beside != subject else ""}
    return row | ({"dim": cell.setting.dim, "heads": cell.setting.heads} if operator else {})


def step_columns(cell: Cell, side: Side, beside: Side | None = None, peaks: Mapping[str, Any] | None = None) -> Row:
    """The columns of one step; ratios where there is something `beside` it."""
    facts = side.facts
    row: Row = {"batch_size": cell.batch, "img_size": show_size(cell.height, cell.width)}
    row |= {"error": side.error, "rounds": len(side.times)}
    row |= {key: facts.get(key) for key in ("gmacs", "peak_mb", "form")}
    if "bytes" in facts:
        row["gbytes"] = facts["bytes"] / 1e9
    if side.times:
        seconds = statistics.median(side.times)
        row |= {"samples_per_sec": cell.batch / seconds, "step_time": 1000 * seconds}
        row |= {"step_time_min": 1000 * min(side.times), "step_time_max": 1000 * max(side.times)}
        reached = roofline(facts, peaks or {}, seconds)
        if reached:
            row |= dict(zip(("roofline", "bound"), reached, strict=True))
    found = ratios(side, beside) if beside else []
    if found:
        row |= {"ratio": statistics.median(found), "ratio_min": min(found), "ratio_max": max(found)}
    return {f"{cell.step}_{key}": _rounded(value) for key, value in row.items()}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 3) if abs(value) >= 1 else float(f"{value:.4g}")


def write_rows(path: Path, rows: Iterable[Row], facts: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """A CSV file, whole at any moment; `facts` hold for every row."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of ours, numbers as numbers.

    Raises:
        LinsightError: no such file, or one of something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or ()
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LinsightError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from None
    lacking = [name for name in ("kind", "model", "tokens", "infer_step_time") if name not in names]
    if lacking:
        raise LinsightError(f"'{path}' is no file of 'linsight bench': it has no column '{lacking[0]}'")
    return [{key: _parsed(key, value) for key, value in row.items() if key} for row in rows]


_TEXT = {"kind", "model", "beside", "device", "precision", "date", "torch", "timm", "linsight"}


def _parsed(key: str, value: str | None) -> Any:
    if key in _TEXT or key.endswith(("error", "form", "bound", "img_size")):
        return value or ""
    if value in ("True", "False"):
        return value == "True"
    try:
        return float(value) if value else None
    except ValueError:
        return None


def results_folder() -> Path:
    """Where results of this machine are kept: `linsight/bench` in the user's cache."""
    return user_cache("bench")


def table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of a table for people, one line for each step; what failed says why."""
    head = ["", "size", "batch", "step", "ms", "time ratio", "MB", "GMACs", "M params", "of the roofline"]
    body = []
    for row in rows:
        for step, words in STEPS.items():
            if row.get(f"{step}_batch_size") in (None, ""):
                continue
            body.append(_line(row, step, words))
    return head, body


def _line(row: Row, step: str, words: str) -> list[str]:
    def cell(key: str, form: str, column: str = "") -> str:
        value = row.get(column or f"{step}_{key}")
        return "-" if value in (None, "") else digits(float(value), form)

    def middle(key: str, form: str) -> str:
        parts = [cell(f"{key}{end}", form) for end in ("", "_min", "_max")]
        return parts[0] if parts[0] == "-" else f"{parts[0]} ({parts[1]}..{parts[2]})"

    bound = row.get(f"{step}_bound")
    share = f"{cell('roofline', '')} % ({bound})" if bound else "-"
    size = str(row[f"{step}_img_size"])
    if row["kind"] == "operator":
        size += f" ({cell('', ',.0f', 'tokens')} tokens)"
    milliseconds = row.get(f"{step}_error") or middle("step_time", "")
    costs = [cell("peak_mb", ".0f"), cell("gmacs", ".3g"), cell("", ".3g", "param_count"), share]
    return [
        *(str(row["model"]), size, cell("batch_size", ".0f"), words, milliseconds),
        *(middle("ratio", ".2f"), *costs),
    ]
