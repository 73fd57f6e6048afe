"""What `accuracy.py` found, as a table, as a picture, and as a page of the documentation."""

import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from linsight.errors import LinsightError
from linsight.runtime.figures import Label, drawing, label_points, new_figure, require_matplotlib, save_figure
from linsight.runtime.files import write_text

HEADER = ("mechanism", "top-1 %", "by seed", "beside softmax", "k params", "M multiply-adds", "images/s, forward")
HEADER += ("images/s, training",)
BASELINE = "softmax"
MARKS = re.compile(r"(<!-- generated: accuracy -->\n).*?(?=<!-- end -->)", re.DOTALL)


def median(values: Iterable[float]) -> float:
    """Of nothing, no number."""
    found = list(values)
    return statistics.median(found) if found else float("nan")


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Top-1 of the runs of each mechanism that came to an end, the best mechanism first."""
    found: dict[str, list[float]] = {row["mechanism"]: [] for row in rows}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        if not row["error"]:
            found[row["mechanism"]].append(float(row["top1"]))
    return dict(sorted(found.items(), key=lambda item: (-statistics.fmean(item[1]) if item[1] else 0.0, item[0])))


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation`."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each mechanism; failed runs are counted, and told of below."""
    found = scores(rows)
    base = found.get(BASELINE)
    failed = [row for row in rows if row["error"]]
    lines = [HEADER, ["---"] * len(HEADER)]
    for name, values in found.items():
        row = next(row for row in rows if row["mechanism"] == name)
        lost = sum(other["mechanism"] == name for other in failed)
        beside = f"{statistics.fmean(values) - statistics.fmean(base):+.2f}" if values and base else "-"
        lines.append(
            [
                f"`{name}`{' (a whole block)' if row['kind'] == 'block' else ''}",
                spread(values) + (f", {lost} of {lost + len(values)} failed" if lost else ""),
                " ".join(f"{value:.2f}" for value in values) or "-",
                beside,
                f"{int(row['params']) / 1e3:.0f}",
                f"{float(row['mmacs']):.1f}",
                *(_speed(row, step) for step in ("forward", "training")),
            ]
        )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    for row in failed:
        text += f"\n\n`{row['mechanism']}`, seed {row['seed']}, failed: {row['error']}"
    return text


def _speed(row: dict[str, Any], step: str) -> str:
    value = row.get(f"{step}_images_per_second")
    return f"{float(value):.0f}" if value not in (None, "") else "-"


@drawing()
def picture(path: Path, rows: Sequence[dict[str, Any]], budget: str) -> None:
    """Accuracy by mechanism, each run a dot; and the mean against the speed of training."""
    require_matplotlib("drawing accuracy.png")
    found = {name: values for name, values in scores(rows).items() if values}
    figure = new_figure(10, 1.5 + 0.26 * len(found))
    left, right = figure.subplots(1, 2)
    points = []
    for place, (name, values) in enumerate(found.items()):
        mean = statistics.fmean(values)
        colour = "tab:red" if name == BASELINE else "tab:blue"
        left.plot(values, [place] * len(values), ".", color=colour, alpha=0.5)
        left.plot(mean, place, "|", color=colour, markersize=12)
        speed = next(_speed(row, "training") for row in rows if row["mechanism"] == name)
        if speed not in ("-", "nan"):
            right.plot(float(speed), mean, "o", color=colour, markersize=4)
            points.append(Label(float(speed), mean, name))
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.set(xlabel="top-1 %, each seed and the mean")
    right.set(xlabel="images a second in training", ylabel="mean top-1 %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"CIFAR-10, {budget}", fontsize=10)
    right.margins(0.1)
    label_points(right, points, size=7)
    save_figure(figure, path)


def write(folder: Path, rows: Sequence[dict[str, Any]], facts: dict[str, Any], arguments: Sequence[str]) -> None:
    """The generated part of `accuracy.md` in a folder, and `accuracy.png` beside it."""
    path = folder / "accuracy.md"
    if not path.exists() or not MARKS.search(path.read_text(encoding="utf-8")):
        raise LinsightError(f"'{path}' is not there, or has no line '<!-- generated: accuracy -->' to write below")
    command = shlex.join(["python", "benchmarks/accuracy.py", *arguments])
    picture(folder / "accuracy.png", rows, facts["budget"])
    told = ", ".join(f"{key} {value}" for key, value in facts.items())
    part = f"```bash\n{command}\n```\n\n{told}\n\n{table(rows)}\n\n![accuracy](accuracy.png)\n"
    text = MARKS.sub(lambda found: found[1] + part, path.read_text(encoding="utf-8"))
    write_text(path, text)
