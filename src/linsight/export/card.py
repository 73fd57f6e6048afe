"""The model card of the Hub: what a model is, how it was made, what it reached, how it is used. No figure is invented.

Names that people chose stand in it as text: nothing of them is taken for Markdown, HTML or YAML.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from linsight.attention import Paper
from linsight.tasks import known_fields

from .about import RESULTS, About, mechanisms_of, papers_of
from .snippets import usage

_CLASSES, _LENGTH = 20, 80  # how many names of classes, and letters of a text, are shown
# Letters that are not seen, or turn those behind them round; two joiners are part of some scripts.
_UNSEEN, _JOINERS = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}, "\u200c\u200d"


def make_card(about: About) -> str:
    """The text of a README.md for the Hub."""
    title = escaped(about.name.rpartition("/")[2])
    parts = [f"---\n{_front(about)}\n---\n", f"# {title}\n", _first(about), _facts(about)]
    if about.results:
        parts.append(_results(about))
    if about.speed:
        parts.append(_speed(about))
    if about.recipe is not None:
        parts.append(_recipe(about.recipe))
    parts += [usage(about.name, about.input_size, bool(about.outputs)), _limits(about), _sources(about)]
    return "\n".join(parts)


def visible(text: str) -> str:
    r"""`text` on one line: letters that are not seen, or turn the line round, are shown as in `\u202e`."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _UNSEEN and letter not in _JOINERS
        else letter
        for letter in text
    )


def escaped(text: str, room: int = _LENGTH) -> str:
    """`text` as text: on one line, of at most `room` letters, no sign of it Markdown, HTML or a link."""
    seen = visible(text)
    seen = seen if len(seen) <= room else f"{seen[: room - 1]}…"
    return "".join(letter if _plain(seen, i) else f"&#{ord(letter)};" for i, letter in enumerate(seen))


def _plain(text: str, place: int) -> bool:
    """True for a letter that Markdown leaves alone where it is."""
    letter, before, after = text[place], text[:place], text[place + 1 :]
    if letter == ".":
        return not before.lower().endswith("www")
    if letter == "_":  # within a word
        return before[-1:].isalnum() and after[:1].isalnum()
    if letter == "-":
        return bool(before)
    return letter.isalnum() or letter in " …,/=();+%" + _JOINERS or unicodedata.category(letter).startswith("M")


# -- parts -------------------------------------------------------------------------------------------------------------


def _front(about: About) -> str:
    task = "image-classification" if about.outputs else "image-feature-extraction"
    data, results = _dataset(about), None
    name = _of_yaml(about.name.rpartition("/")[2])
    if "top1" in about.results and about.data:
        kind: dict[str, Any] = {
            "task_type": task,
            "dataset_type": data or "custom",
            "dataset_name": _of_yaml(about.data),
        }
        results = [EvalResult(metric_type="accuracy", metric_value=round(about.results["top1"], 4), **kind)]
    return ModelCardData(
        license=about.licence or None,
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "linsight", "linear-attention", *(entry.name for entry in mechanisms_of(about.attention))],
        datasets=[data] if data else None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results,
    ).to_yaml()


def _of_yaml(text: str) -> str:
    """`text` on one line, without what templates look for; quoting it is PyYAML's."""
    return visible(text).translate({ord("{"): "(", ord("}"): ")"})


def _dataset(about: About) -> str:
    """The name of the data on the Hub, "" where it is not there."""
    data = str((about.recipe or {}).get("data", ""))
    found = re.fullmatch(r"hf(?:ids|ds)[:/]([\w.-]+/[\w.-]+|[\w.-]+)", data, re.ASCII)
    return found[1] if found else ""


def _first(about: About) -> str:
    names = " and ".join(f"`{entry.name}`" for entry in mechanisms_of(about.attention))
    inside = f" with {names} attention" if names else ""
    made = ", trained with" if about.recipe is not None else ", saved by"
    return f"`{about.architecture}`{inside}{made} `linsight`: linear-time attention for vision, in timm's backbones.\n"


def _facts(about: About) -> str:
    channels, height, width = about.input_size
    rows = [
        ("architecture", f"`{about.architecture}`"),
        *(
            (f"`{entry.name}`", f"{escaped(entry.formula, 200)}; {escaped(entry.complexity)}")
            for entry in mechanisms_of(about.attention)
        ),
        ("parameters", f"{about.params:,}"),
        ("images", f"{height}x{width}, {channels} channel{'s' if channels > 1 else ''}; other sizes work too"),
        ("classes", _listed(about.classes)),
        ("data", escaped(about.data)),
    ]
    return "## Model\n\n" + _table(("", ""), [row for row in rows if row[1]])


def _listed(classes: Sequence[str]) -> str:
    if not classes:
        return ""
    more = f", and {len(classes) - _CLASSES} more" if len(classes) > _CLASSES else ""
    return f"{len(classes)}: " + ", ".join(escaped(name, 40) for name in classes[:_CLASSES]) + more


def _results(about: About) -> str:
    rows = [(label, form.format(about.results[key])) for key, (label, form) in RESULTS.items() if key in about.results]
    few = about.classes and len(about.classes) <= 5
    return "## Results\n\n" + _table(("", ""), [row for row in rows if not (few and row[0] == "top-5")])


def _speed(about: About) -> str:
    rows = [
        [escaped(row[key]) for key in ("model", "size", "batch", "beside", "ratio", "device")] for row in about.speed
    ]
    head = ("model", "image", "batch", "beside", "its time, as a share", "on")
    return "## Speed beside softmax\n\nTime of a forward, measured in turns in one process.\n\n" + _table(head, rows)


def _recipe(recipe: Mapping[str, Any]) -> str:
    rows = [(f"`{name}`", escaped(_said(value), 200)) for name, value in recipe.items() if name in known_fields()]
    if not rows:
        return ""
    return "## Recipe\n\nFields of `linsight train` that differ from its defaults.\n\n" + _table(
        ("field", "value"), rows
    )


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _limits(about: About) -> str:
    lines = ["It was made for images like those that it was trained on; on others it may be wrong, and be sure of it."]
    if "top1" in about.results:
        lines.append("Its results are of one run, chosen by the same images that they are told of.")
    if not about.results:
        lines.append("Nothing is told here of how well it does: measure it before you rely on it.")
    return "## Limits\n\n" + "".join(f"- {line}\n" for line in lines)


def _sources(about: About) -> str:
    licence = f"`{about.licence}`" if about.licence else "not stated: ask who put it here before you use it"
    lines = [f"## Licence and sources\n\nLicence of these weights: {licence}.\n"]
    if papers := papers_of(about.architecture, about.attention):
        lines.append("Cite the papers of what is in it:\n\n" + "".join(f"- {_cited(paper)}\n" for paper in papers))
    return "\n".join(lines)


def _cited(paper: Paper) -> str:
    link = f", [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    return f"{escaped(paper.title, 200)}{f', {escaped(paper.venue)}' if paper.venue else ''}{link}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)
