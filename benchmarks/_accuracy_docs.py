"""What `accuracy.py` found, as tables, as pictures, and as a page of the documentation.

Ranks are ranges: a mechanism comes after those that are better by more than chance, and before those that are worse by
more than chance, by Tukey's honest test of all pairs at 5 %, whose spread is that of the seeds of all mechanisms.
"""

import collections
import math
import re
import shlex
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _places import Place
from scipy.stats import rankdata, studentized_range

from linsight.errors import LinsightError
from linsight.runtime.figures import Label, drawing, label_points, new_figure, require_matplotlib, save_figure
from linsight.runtime.files import write_text

HEADER = (
    "mechanism",
    "rank",
    "top-1 %",
    "by seed",
    "beside softmax",
    "k params",
    "M multiply-adds",
)
STEPS = ("forward", "training")  # images a second, where these were timed
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


def tells_apart(found: Mapping[str, Sequence[float]]) -> Callable[[str, str], bool] | None:
    """True of two mechanisms whose means differ by more than chance (Tukey and Kramer, 5 %); None: nothing to go by.

    A tenth of the mechanisms have to have several seeds, for the spread of these to stand for that of all.
    """
    groups = {name: values for name, values in found.items() if values}
    free = sum(len(values) - 1 for values in groups.values())
    if len(groups) < 2 or sum(len(values) > 1 for values in groups.values()) < max(len(groups) / 10, 1):
        return None
    within = (
        sum(statistics.variance(values) * (len(values) - 1) for values in groups.values() if len(values) > 1) / free
    )
    limit = float(studentized_range.ppf(0.95, len(groups), free))

    def differ(one: str, other: str) -> bool:
        error = math.sqrt(within / 2 * (1 / len(groups[one]) + 1 / len(groups[other])))
        return abs(statistics.fmean(groups[one]) - statistics.fmean(groups[other])) > limit * error

    return differ


def ranks(found: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """The best and the worst place of each mechanism that the test leaves open, as `3-9`."""
    differ = tells_apart(found)
    means = {name: statistics.fmean(values) for name, values in found.items() if values}
    if differ is None:
        return dict.fromkeys(found, "-")
    shown = dict.fromkeys(found, "-")
    for name, mean in means.items():
        apart = [other for other in means if other != name and differ(name, other)]
        first = 1 + sum(means[other] > mean for other in apart)
        last = len(means) - sum(means[other] < mean for other in apart)
        shown[name] = f"{first}-{last}" if last > first else f"{first}"
    return shown


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation`."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each mechanism; failed runs are counted, and told of below."""
    found = scores(rows)
    base, places = found.get(BASELINE), ranks(found)
    failed = [row for row in rows if row["error"]]
    timed = [step for step in STEPS if any(_speed(row, step) != "-" for row in rows)]
    header = [*HEADER, *(f"images/s, {step}" for step in timed)]
    lines = [header, ["---"] * len(header)]
    for name, values in found.items():
        row = next(row for row in rows if row["mechanism"] == name)
        lost = sum(other["mechanism"] == name for other in failed)
        beside = f"{statistics.fmean(values) - statistics.fmean(base):+.2f}" if values and base else "-"
        lines.append(
            [
                _shown(name, row["kind"]),
                places[name],
                spread(values) + (f", {lost} of {lost + len(values)} failed" if lost else ""),
                " ".join(f"{value:.2f}" for value in values) or "-",
                beside,
                f"{int(row['params']) / 1e3:.0f}",
                f"{float(row['mmacs']):.1f}",
                *(_speed(row, step) for step in timed),
            ]
        )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    for row in failed:
        text += f"\n\n`{row['mechanism']}`, seed {row['seed']}, failed: {row['error']}"
    return text


def _shown(name: str, kind: str) -> str:
    return f"`{name}`{' (a whole block)' if kind == 'block' else ''}"


def order(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The place of each mechanism by its mean, from 1; equal ones share theirs, and what failed shares the last."""
    means = [-statistics.fmean(values) if values else 1.0 for values in found.values()]
    return dict(zip(found, map(float, rankdata(means)), strict=True))


def overview(found: Mapping[Place, Sequence[dict[str, Any]]]) -> str:
    """One line for each mechanism, with its mean and its rank at each place: first what comes first on average.

    Who has not been run at some place yet has no average, and comes last.
    """
    means = {at: scores(rows) for at, rows in found.items()}
    places = {at: ranks(values) for at, values in means.items()}
    orders = [order(values) for values in means.values()]
    names = {name: kind for rows in found.values() for name, kind in ((row["mechanism"], row["kind"]) for row in rows)}
    everywhere = [name for name in names if all(name in at for at in orders)]
    average = {name: statistics.fmean(at[name] for at in orders) for name in everywhere}
    header = ["mechanism", "place on average", *(at.name for at in found)]
    lines = [header, ["---"] * len(header)]
    for name in sorted(names, key=lambda name: (average.get(name, math.inf), name)):
        cells = [
            f"{statistics.fmean(values[name]):.1f} ({places[at][name]})" if values.get(name) else "-"
            for at, values in means.items()
        ]
        lines.append([_shown(name, names[name]), f"{average[name]:.1f}" if name in average else "-", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _speed(row: dict[str, Any], step: str) -> str:
    value = row.get(f"{step}_images_per_second")
    return f"{float(value):.0f}" if value not in (None, "") else "-"


@drawing()
def picture(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Accuracy by mechanism, each run a dot; and, where that was timed, the mean against the speed of training."""
    require_matplotlib(f"drawing {path.name}")
    found = {name: values for name, values in scores(rows).items() if values}
    speeds = [(row["mechanism"], _speed(row, "training")) for row in rows]  # not of each row, as a run may be later
    timed = {name: float(speed) for name, speed in speeds if name in found and speed not in ("-", "nan")}
    figure = new_figure(10, 1.5 + 0.26 * len(found))
    left, *others = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    points = []
    for place, (name, values) in enumerate(found.items()):
        mean = statistics.fmean(values)
        colour = "tab:red" if name == BASELINE else "tab:blue"
        left.plot(values, [place] * len(values), ".", color=colour, alpha=0.5)
        left.plot(mean, place, "|", color=colour, markersize=12)
        if name in timed:
            others[0].plot(timed[name], mean, "o", color=colour, markersize=4)
            points.append(Label(timed[name], mean, name))
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.margins(y=0.01)
    left.set(xlabel="top-1 %, each seed and the mean")
    for axes in (left, *others):
        axes.grid(alpha=0.3)
    figure.suptitle("\n".join(line for part in title.splitlines() for line in textwrap.wrap(part, 110)), fontsize=10)
    for axes in others:
        axes.set(xlabel="images a second in training", ylabel="mean top-1 %")
        axes.margins(0.1)
        label_points(axes, points, size=7)
    save_figure(figure, path)


def write(folder: Path, found: Mapping[Place, Sequence[dict[str, Any]]], arguments: Sequence[str]) -> None:
    """The generated part of `accuracy.md` in a folder, a section for each place, and a picture of each beside it."""
    path = folder / "accuracy.md"
    if not path.exists() or not MARKS.search(path.read_text(encoding="utf-8")):
        raise LinsightError(f"'{path}' is not there, or has no line '<!-- generated: accuracy -->' to write below")
    parts = [f"```bash\n{shlex.join(['python', 'benchmarks/accuracy.py', *arguments])}\n```\n"]
    found = {at: rows for at, rows in found.items() if rows}
    if len(found) > 1:
        parts.append(f"## All places\n\nTop-1 %, mean of the seeds, and the rank in brackets.\n\n{overview(found)}\n")
    for at, rows in found.items():
        drawn = f"accuracy-{at.name}.png"
        picture(folder / drawn, rows, f"{at.about}\n{rows[0]['budget']}")
        devices = ", ".join(sorted({row["device"] for row in rows}))
        told = [f"{rows[0]['budget']}; {devices}, {rows[0]['precision']}, threads {rows[0]['threads']}"]
        if timed := {row["speed_device"] for row in rows if row.get("speed_device")}:
            told.append(f"speeds on {', '.join(sorted(timed))}")
        runs = collections.Counter(int(row["seed"]) for row in rows if not row["error"])
        told.append(f"runs {', '.join(f'{count} of seed {seed}' for seed, count in sorted(runs.items()))}")
        told += [f"{key} {', '.join(sorted({row[key] for row in rows}))}" for key in ("torch", "timm", "linsight")]
        parts.append(f"## {at.about[0].upper()}{at.about[1:]}\n\n{', '.join(told)}\n")
        parts.append(f"{table(rows)}\n\n![{at.name}]({drawn})\n")
    text = MARKS.sub(lambda match: match[1] + "\n".join(parts), path.read_text(encoding="utf-8"))
    write_text(path, text)
