"""The sections that every run has, whatever it learns, and its page made of them and of what its task found."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from linsight.errors import LinsightError
from linsight.runtime.files import read_json, to_json, write_text, writing
from linsight.tasks import record_of

from ..run import CONFIG, METRICS, SUMMARY
from .charts import Points, line_chart
from .page import Findings, Section, code, folded, isolated, make_page, name, number, paragraph, table, tiles
from .use import again, secretless, usage

PAGE = "report.html"
_LOSSES = {"train_loss": "training", "val_loss": "evaluation"}
_HARDWARE = ("cpu", "cores", "memory_gib", "gpus", "system")


@dataclasses.dataclass(frozen=True)
class Kept:
    """A run as its folder tells. config: of config.json.  rows: of metrics.jsonl.  summary: {} where it did not end."""

    folder: pathlib.Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The fields of its recipe."""
        return self.config["recipe"]


def read_kept(folder: pathlib.Path) -> Kept:
    """Read a run folder, which may be anybody's.

    Raises:
        LinsightError: it is none, or a file in it is damaged.
    """
    if not (folder / CONFIG).exists():
        raise LinsightError(f"'{folder}' is no run folder: it has no {CONFIG}")
    config = read_json(folder / CONFIG)
    for key in ("recipe", "data", "versions"):
        if not isinstance(config.get(key), dict):
            raise LinsightError(f"'{folder / CONFIG}' is damaged: its '{key}' is no object of JSON")
    rows: list[Mapping[str, Any]] = []
    if (folder / METRICS).is_file():
        try:
            rows = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
        except (ValueError, RecursionError) as error:
            raise LinsightError(f"'{folder / METRICS}' is damaged: {str(error).splitlines()[0]:.100}") from error
    if not all(isinstance(row, dict) and number(row.get("epoch")) is not None for row in rows):
        raise LinsightError(f"'{folder / METRICS}' is damaged: a line of it is not of an epoch")
    return Kept(folder, config, rows, read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else {})


def write_page(kept: Kept, findings: Findings, out: pathlib.Path | None = None) -> pathlib.Path:
    """Write the page of a run, into its folder unless told; its path."""
    path = out or kept.folder / PAGE
    recipe, epochs = kept.recipe, len(kept.rows)
    attention = f" ({recipe['attention']})" if recipe.get("attention") else ""
    words = secretless(f"{recipe.get('model')}{attention} on {recipe.get('data')}")
    lead = [paragraph(Markup("{}.").format(findings.headline))]
    if not kept.summary:
        lead.append(paragraph(f"The run was stopped, or goes on: {epochs} of {recipe.get('epochs')} epochs are done."))
    lead += [paragraph(isolated(secretless(note), 300), "soft") for note in findings.notes]
    figures = {**findings.figures, **_figures(kept)}
    sections = [Section("Course", _curves(kept.rows, findings)), *findings.sections, _speed(kept.rows)]
    sections += [_recipe(recipe), _machine(kept.config), *_ways(kept)]
    page = make_page(words, [*lead, tiles(figures)], sections)
    with writing(path):
        write_text(path, page)
    return path


def _figures(kept: Kept) -> dict[str, str]:
    told, data = kept.summary, kept.config["data"]
    seconds = number(told.get("seconds")) or sum(number(row.get("seconds")) or 0 for row in kept.rows)
    counts = {"parameters": told.get("params"), "images to train on": data.get("train")}
    counts |= {"images to evaluate on": data.get("val")}
    shown = {label: f"{value:,.0f}" for label, count in counts.items() if (value := number(count)) is not None}
    return {**shown, "time": f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"}


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> Points:
    return [(row["epoch"], value) for row in rows if (value := number(row.get(column))) is not None]


def _curves(rows: Sequence[Mapping[str, Any]], findings: Findings) -> Markup:
    if not rows:
        return paragraph("No epoch is done.")
    drawn = {label: points for column, label in findings.metrics.items() if (points := _points(rows, column))}
    charts = [
        line_chart("loss", {label: _points(rows, column) for column, label in _LOSSES.items()}),
        line_chart(f"on the images to evaluate on, {findings.unit}", drawn, unit=f" {findings.unit}"),
        line_chart("learning rate", {"": _points(rows, "lr")}),
    ]
    return Markup('<div class="charts">\n{}\n</div>').format(Markup("\n").join(charts))


def _speed(rows: Sequence[Mapping[str, Any]]) -> Section:
    """The images a second of each epoch, and what its time went into, where the rows tell."""
    speeds = [speed for _, speed in _points(rows, "images_per_second")]
    if not speeds:
        return Section("Speed", paragraph("No epoch is done."))
    said = f"{sorted(speeds)[len(speeds) // 2]:,.0f} images a second in training, the median of {len(speeds)} epochs."
    waited, seconds = (sum(value for _, value in _points(rows, key)) for key in ("waited", "seconds"))
    if waited and seconds:
        said += f" It waited for images to be read for {100 * waited / seconds:.0f} % of the time."
    skipped = max((value for _, value in _points(rows, "skipped")), default=0)
    if skipped:
        said += f" {skipped:.0f} images of an epoch could not be read and were skipped."
    chart = line_chart("images a second in training", {"": _points(rows, "images_per_second")})
    return Section("Speed", paragraph(said) + chart)


def _recipe(recipe: Mapping[str, Any]) -> Section:
    plain = json.loads(to_json(record_of(recipe.get("task", "classify"))().values()))
    rows = {key: (key, isolated(secretless(_said(value)), 120)) for key, value in recipe.items()}
    other = [row for key, row in rows.items() if recipe[key] != plain.get(key)]
    rest = [row for key, row in rows.items() if recipe[key] == plain.get(key)]
    body = table(("", ""), [(name(key), value) for key, value in other])
    title = f"{len(rest)} fields as they are by default"
    return Section("Recipe", body + folded(title, table(("", ""), [(name(key), value) for key, value in rest])))


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        value = [f"{key}={item}" for key, item in value.items()]
    text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return text or "none"


def _machine(config: Mapping[str, Any]) -> Section:
    found = config.get("machine")
    labels = dict(zip(_HARDWARE, ("CPU", "cores", "memory, GiB", "GPUs", "system"), strict=True))
    hardware = found if isinstance(found, Mapping) else {}
    rows = [(label, isolated(_said(hardware[key]), 120)) for key, label in labels.items() if hardware.get(key)]
    rows += [("threads", isolated(config["threads"]))] if config.get("threads") else []
    rows += [(name(key), isolated(value)) for key, value in config["versions"].items()]
    return Section("Machine and versions", table(("", ""), rows))


def _ways(kept: Kept) -> list[Section]:
    """How to make the run again, to go on with it, and to use its model."""
    made = code(again(str(kept.config.get("name", "")), kept.recipe))
    return [Section("Make it again", made), Section("Use it", usage(kept.folder, finished=bool(kept.summary)))]
