"""Facts that a saved model tells of itself: its parts, its run, and nothing of the machine that it was made on."""

import csv
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from linsight.attention import Mechanism, Paper, list_attentions
from linsight.errors import LinsightError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS
from linsight.models.plan import names
from linsight.recipe import Recipe
from linsight.runtime.text import printable

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_BENCH = "bench.csv"  # as `linsight bench --out FOLDER` writes it


@dataclasses.dataclass(frozen=True)
class About:
    """All that a card tells.

    name: OWNER/NAME, or the name of the model.  architecture, attention: as `create_model` takes them.
    params: how many.  input_size: channels, height and width.
    outputs: of the classifier, 0 where there is none.  classes: their names; () where unknown.
    recipe: without what is of one machine; None: not a run of ours.
    results: of the run's summary.  data: what to call the images that it was trained on.
    speed: rows of `linsight bench` beside softmax.  licence: an identifier of the Hub; "": not stated.
    """

    name: str
    architecture: str
    attention: str
    params: int
    input_size: tuple[int, int, int]
    outputs: int = 0
    classes: tuple[str, ...] = ()
    recipe: Mapping[str, Any] | None = None
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""
    speed: Sequence[Mapping[str, str]] = ()
    licence: str = ""


def check_licence(licence: str) -> str:
    """`licence`, an identifier as the Hub has them.

    Raises:
        LinsightError: it is none.
    """
    if licence and not _LICENCE.fullmatch(licence):
        raise LinsightError(
            f"licence '{printable(licence)[:80]}' is no identifier of the Hub: as apache-2.0, mit, cc-by-4.0, other"
        )
    return licence


RESULTS = {
    "top1": ("top-1", "{:.2f} %"),
    "top5": ("top-5", "{:.2f} %"),
    "val_loss": ("loss", "{:.4f}"),
    "val_images": ("images it was evaluated on", "{:,.0f}"),
    "train_images": ("images it was trained on", "{:,.0f}"),
    "epochs": ("epochs", "{:.0f}"),
    "best_epoch": ("the epoch of these weights", "{:.0f}"),
    "seconds": ("training time", "{:,.0f} s"),
}


def known_results(summary: Mapping[str, Any]) -> dict[str, float]:
    """Numbers that a run's summary tells, without what is of one machine."""
    return {
        key: summary[key]
        for key in RESULTS
        if isinstance(summary.get(key), int | float) and math.isfinite(summary[key]) and abs(summary[key]) < 1e15
    }


def read_speed(folder: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a `bench.csv` in a run folder that were measured beside something; none where there is no such."""
    path = folder / _BENCH
    if not path.is_file() or path.stat().st_size > 2**20:
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    keys = {
        "size": "infer_img_size",
        "batch": "infer_batch_size",
        "beside": "beside",
        "device": "device",
        "model": "model",
    }
    return [
        {
            **{key: str(row.get(column) or "") for key, column in keys.items()},
            "ratio": f"{float(row['infer_ratio']):.2f}",
        }
        for row in rows[:100]
        if row.get("beside") and re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", row.get("infer_ratio") or "")
    ]


def mechanisms_of(attention: str) -> list[Mechanism]:
    """The mechanisms that a plan names, as in "inline,inline:2/softmax"."""
    named = dict.fromkeys(names(attention))
    known = {entry.name: entry for entry in list_attentions()}
    return [known[name] for name in named if name in known]


def papers_of(architecture: str, attention: str) -> list[Paper]:
    """The papers of a model and of its mechanisms, each once."""
    entry: Any = VARIANTS.get(architecture) or ARCHITECTURES.get(architecture) or HOSTS.get(architecture)
    host = HOSTS.get(getattr(entry, "host", ""))
    found = [getattr(entry, "paper", None), *(row.paper for row in mechanisms_of(attention)), host and host.paper]
    return list(dict.fromkeys(paper for paper in found if paper))


def shared_recipe(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that differ from the defaults and that its result depends on, without folders."""
    values = {name: value for name, value in recipe.differences().items() if name not in recipe.RESUMABLE}
    for name in _PLACES:
        if values.get(name) is not None:
            values[name] = _place(str(values[name]))
    values.pop("data_dir", None)
    return {name: _cut(value) if name not in _PLACES else value for name, value in values.items()}


_PLACES = ("data", "init", "teacher", "teacher_checkpoint")
_KNOWN_PLACES = re.compile(r"(?:torch|hfds|hfids|tfds|wds|hf-hub|timm)[:/][\w.-]+(?:/[\w.-]+)?", re.ASCII)


def _place(text: str) -> str:
    """A name of data or weights: an address without what is secret in it, else the last part of a path."""
    if re.match(r"https?://", text):
        return re.sub(r"^(https?://)[^/@]*@", r"\1", text.partition("?")[0].partition("#")[0])
    if _KNOWN_PLACES.fullmatch(text) and not pathlib.Path(text).exists():
        return text
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1]


def _cut(value: Any) -> Any:
    """`value`, of texts in it that are paths the last part alone."""
    if isinstance(value, str):
        return _place(value) if re.match(r"([A-Za-z]:)?[\\/]|~", value) else value
    if isinstance(value, Mapping):
        return {key: _cut(item) for key, item in value.items()}
    return tuple(map(_cut, value)) if isinstance(value, list | tuple) else value
