"""A page of HTML out of sections: one file that fetches nothing and runs nothing, in light and in dark.

Texts are escaped where they are put in: `Markup` is HTML already, whatever else is text.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from linsight.runtime.text import printable, shorten

_STYLE = Markup("""
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6675; --line: #d8dde4; --paper: #fff; --panel: #f5f7f9;
  --c0: #1f6feb; --c1: #d1570b; --c2: #1a7f37; --c3: #8250df; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --soft: #98a3b3; --line: #343c48; --paper: #14181e;
  --panel: #1c222b; --c0: #62a3ff; --c1: #ff9d5c; --c2: #5cc878; --c3: #b794f6; --bad: #ff7b72; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.1rem; }
p { margin: .4rem 0; max-width: 52rem; overflow-wrap: anywhere; } .soft, figcaption { color: var(--soft); }
.tiles, .charts, .pictures { display: flex; flex-wrap: wrap; gap: .8rem; }
.tiles div { padding: .5rem .9rem; background: var(--panel); border-radius: .5rem; } .tiles b { font-size: 1.25rem; }
.tiles span { display: block; color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; } th, td { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; } th { color: var(--soft); font-weight: normal; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { padding: .7rem .9rem; background: var(--panel); border-radius: .5rem; overflow-x: auto; }
figure { margin: 0; } .pictures figure { width: 112px; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
.pictures img { width: 112px; height: 112px; object-fit: contain; background: var(--panel);
  image-rendering: pixelated; } .bad { color: var(--bad); }
.wide figure { width: 32rem; } .wide img { width: 100%; height: auto; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .soft { fill: var(--soft); } svg path { fill: none; stroke-width: 1.8; }
svg .c0 { stroke: var(--c0); } svg .c1 { stroke: var(--c1); }
svg .c2 { stroke: var(--c2); } svg .c3 { stroke: var(--c3); }
svg .f0 { fill: var(--c0); } svg .f1 { fill: var(--c1); } svg .f2 { fill: var(--c2); } svg .f3 { fill: var(--c3); }
svg .cell { fill: var(--c0); } svg .miss { fill: var(--bad); } meter { width: 9rem; }
""")
# Whatever got into the page, a browser fetches nothing for it and runs nothing in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PAGE = Markup("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{lead}
{sections}
</body>
</html>
""")


class Section(NamedTuple):
    """A part of a page: its title, and its body in HTML."""

    title: str
    body: Markup


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that a task tells a page.

    headline: its main result, in words.  figures: main results, by what they are.
    metrics: columns of metrics.jsonl that are drawn, with what to call them.  unit: of these.
    sections: its own, behind the curves.  notes: what is missing and why.
    """

    headline: str
    figures: Mapping[str, str]
    metrics: Mapping[str, str]
    sections: Sequence[Section] = ()
    notes: Sequence[str] = ()
    unit: str = "%"


def make_page(title: str, lead: Iterable[Markup], sections: Iterable[Section]) -> str:
    """The page. lead: stands between title and sections."""
    parts = (Markup("<section>\n<h2>{}</h2>\n{}\n</section>").format(*section) for section in sections)
    return str(
        _PAGE.format(
            policy=_POLICY,
            title=name(title, 160),
            style=_STYLE,
            lead=Markup("\n").join(lead),
            sections=Markup("\n").join(parts),
        )
    )


def name(text: object, room: int = 60) -> str:
    """A text that a user chose, on one line of at most `room` columns; not HTML yet."""
    # letters that turn a line round do so in their own element alone, where it is told in <bdi>
    return shorten(str(text), room)


def isolated(text: object, room: int = 60) -> Markup:
    """A text that a user chose, as HTML: it does not turn round what stands beside it."""
    return Markup("<bdi>{}</bdi>").format(name(text, room))


def paragraph(text: str | Markup, kind: str = "") -> Markup:
    """A paragraph; kind: "soft" is one in grey."""
    return Markup('<p class="{}">{}</p>').format(kind, text)


def tiles(figures: Mapping[str, str]) -> Markup:
    """Figures in large letters above what they are."""
    each = Markup("<div><b>{}</b><span>{}</span></div>")
    return Markup('<div class="tiles">{}</div>').format(Markup().join(each.format(v, k) for k, v in figures.items()))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Sequence[int] = ()) -> Markup:
    """A table. numbers: columns that are aligned to the right."""

    def line(cells: Sequence[Any], tag: str) -> Markup:
        cell = {column: Markup(f'<{tag} class="n">{{}}</{tag}>') for column in numbers}
        plain = Markup(f"<{tag}>{{}}</{tag}>")
        return Markup("<tr>{}</tr>\n").format(
            Markup().join(cell.get(place, plain).format(value) for place, value in enumerate(cells))
        )

    top = line(head, "th") if any(head) else ""
    return Markup("<table>\n{}{}</table>").format(top, Markup().join(line(row, "td") for row in rows))


def code(text: str) -> Markup:
    """Lines to type."""
    return Markup("<pre><code>{}</code></pre>").format("\n".join(map(printable, text.splitlines())))


def folded(title: str, body: Markup) -> Markup:
    """A part that is opened by its title."""
    return Markup("<details><summary>{}</summary>\n{}\n</details>").format(title, body)


def number(value: object) -> float | None:
    """`value` if it is a number of everyday size, None where a file that is anybody's has something else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        return None
    return float(value)
