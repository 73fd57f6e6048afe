"""The catalogue as plain data: mechanisms, models, and what they cost. The CLI and the documentation show it."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from linsight.attention import (
    FLAGS,
    WAYS,
    Mechanism,
    Paper,
    create_attention,
    create_block,
    list_attentions,
    mechanism,
    why_not,
)
from linsight.attention.registry import called
from linsight.bench.counting import count_macs, count_parameters
from linsight.errors import LinsightError, UnknownNameError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS, create_model, default_attention, default_config
from linsight.models.hosts.dyn_perceiver import DynamicPerceiver
from linsight.models.plan import named
from linsight.models.video.create import VIDEO_MODELS
from linsight.ops import Grid
from linsight.records import shown

# The layer that `mechanism_info` measures: tokens of a 224 and of a 1024 image in patches of 16.
DIM, HEADS, GRIDS = 192, 6, (Grid(14, 14), Grid(64, 64))


def list_mechanisms(family: str | None = None, can: Iterable[str] = (), search: str = "") -> list[dict[str, Any]]:
    """One row for each mechanism: name, other names, kind, family, year, complexity, paper, capabilities.

    family, can: those of a family alone, and that can do all of this.  search: those with these words in their names,
    summary, family, year or paper, in whatever case.

    Raises:
        UnknownNameError: no such family or capability.
    """
    found = [_mechanism_row(entry) for entry in list_attentions(family=family, **dict.fromkeys(can, True))]
    return [row for row in found if all(word in _words(row) for word in search.casefold().split())]


def _words(row: dict[str, Any]) -> str:
    told = (row[key] for key in ("name", "family", "year", "summary"))
    return " ".join(map(str, (*told, *row["also"], *row["paper"].values()))).casefold()


def list_models() -> list[dict[str, Any]]:
    """One row for each variant, then for each host that takes any mechanism, then for each model that takes none."""
    return [_model_row(name) for names in (VARIANTS, HOSTS, ARCHITECTURES) for name in sorted(names)]


def info(name: str, attention: str | None = None) -> dict[str, Any]:
    """All about a mechanism or a model; `attention` puts another mechanism into the model.

    Raises:
        UnknownNameError: neither a mechanism nor a model; the nearest is offered.
        LinsightError: another mechanism for what is a mechanism itself, or a model of videos.
    """
    mechanisms = {entry.name for entry in list_attentions()}
    if name in mechanisms:
        if attention is not None:
            raise LinsightError(f"'{name}' is a mechanism: attention={shown(attention)} is for a model")
        return mechanism_info(name)
    models = {*VARIANTS, *HOSTS, *ARCHITECTURES}
    if name in models:
        return model_info(name, attention)
    if name in VIDEO_MODELS:
        raise LinsightError(
            f"'{name}' is a model of videos, linsight.models.create_video_model('{name}'): docs/video.md"
        )
    hint = "'linsight list' shows all"
    raise UnknownNameError("mechanism or model", name, mechanisms | models, hint, here=called(name))


def mechanism_info(name: str) -> dict[str, Any]:
    """A mechanism's row, its options, and the cost of one layer of it (of one block, where it is one).

    Raises:
        UnknownNameError: not a mechanism; the nearest is offered.
    """
    entry = mechanism(name)
    row = _mechanism_row(entry)
    row["options"] = [option.__dict__ for option in entry.options]
    row["cost"] = [_cost(entry, grid) for grid in GRIDS]
    return row


def model_info(name: str, attention: str | None = None) -> dict[str, Any]:
    """A model's row, its parameters and its multiply-adds for one image of its size.

    Raises:
        UnknownNameError: no such model or mechanism; the nearest is offered.
    """
    with torch.device("meta"):
        model = create_model(name, attention=attention).eval()
    size = model.pretrained_cfg["input_size"]  # type: ignore[index]
    row = _model_row(name)
    if attention not in (None, row["attention"]):  # another model than the published one
        row |= {"attention": attention, "published": {}, "weights": "", "code": "", "paper": {}}
    row["params"] = count_parameters(model)
    row["gmacs"] = count_macs(model, torch.empty(1, *size, device="meta")) / 1e9
    row["ways"] = ways({way: why_not(model, way) for way in WAYS})
    if isinstance(model, DynamicPerceiver):
        row["exit_gmacs"] = [cost / 1e9 for cost in model.exit_costs()]
    return row


def _cost(entry: Mechanism, grid: Grid) -> dict[str, Any]:
    create = create_block if entry.kind == "block" else create_attention
    layer = create(entry.name, DIM, HEADS, device="meta")
    macs = count_macs(layer, torch.empty(1, grid.tokens, DIM, device="meta"), grid)
    return {
        "dim": DIM,
        "heads": HEADS,
        "grid": f"{grid.height}x{grid.width}",
        "params": count_parameters(layer),
        "macs": macs,
    }


def _mechanism_row(entry: Mechanism) -> dict[str, Any]:
    return {
        "name": entry.name,
        "also": list(entry.also),
        "kind": entry.kind,
        "family": entry.family,
        "year": entry.paper.year,
        "summary": (inspect.getdoc(entry.factory) or "").partition("\n")[0],
        "formula": entry.formula,
        "complexity": entry.complexity,
        "paper": _paper_row(entry.paper),
        "capabilities": {flag: entry.can(flag) for flag in FLAGS},
        "cost": entry.structure.cost.value,
        "ways": ways(entry.unmet),
    }


def ways(unmet: Mapping[str, str]) -> dict[str, str]:
    """Each way out by its name, and "yes", or the reason why there is none."""
    return {name: unmet.get(way) or "yes" for way, name in WAYS.items()}


def _model_row(name: str) -> dict[str, Any]:
    variant, alone = VARIANTS.get(name), ARCHITECTURES.get(name)
    host = None if alone else HOSTS[variant.host if variant else name]
    entry: Any = alone or variant or host
    return {
        "name": name,
        "kind": "architecture" if alone else "variant" if variant else "host",
        "host": host.name if host else "",
        "attention": default_attention(name) if host else "",
        "image_size": "x".join(map(str, default_config(name)["input_size"][-2:])),
        "published": dict(entry.published),
        "paper": _paper(entry),
        "weights": entry.weights,
        "code": entry.code,
    }


def _paper(entry: Any) -> dict[str, str]:
    """The paper of a model, or else of its mechanism, the first of several."""
    paper = entry.paper
    if paper is None and hasattr(entry, "attention"):
        paper = named(entry.attention)[0].paper
    return _paper_row(paper) if paper else {}


def _paper_row(paper: Paper) -> dict[str, str]:
    url = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""
    return {"title": paper.title, "venue": paper.venue, "url": url}
