"""Results as one page that needs nothing else: no script, style or picture from elsewhere."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linsight.runtime.files import write_text
from linsight.runtime.text import printable

from .plot import svg
from .rows import Row, table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }
th { cursor: pointer; position: sticky; top: 0; background: #fff; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
"""

# Sorts by the column whose head is clicked: by number where there is one, the other way round at the second click.
_SCRIPT = """
document.querySelectorAll("th").forEach((head, column) => head.onclick = () => {
  const body = document.querySelector("tbody"), down = head.dataset.down = head.dataset.down === "1" ? "" : "1";
  const value = row => row.cells[column].textContent, number = row => parseFloat(value(row));
  const order = (a, b) => isNaN(number(a)) || isNaN(number(b))
    ? value(a).localeCompare(value(b)) : number(a) - number(b);
  body.append(...[...body.rows].sort((a, b) => down ? order(a, b) : order(b, a)));
});
"""

_NOTES = (
    "ms: a step of the whole batch, median (lowest..highest) of rounds that alternate between all that is compared.",
    "Time ratio: to what stands beside it, softmax unless another was asked for, in the same rounds, likewise; below 1 "
    "is faster.",
    "MB: the most memory that a step takes beyond what was there before it.",
    "GMACs: billions of multiply-adds of matrix products and convolutions for one image, forward.",
    "Of the roofline: the share of what this machine reached in a large matrix product (operations) or a large copy "
    "(bytes), of the one that takes longer. Bytes of an operator are the least that it must read and write; those of "
    "a model are all inputs and outputs of its operators, some of which a cache saves, so that a share may pass 100 %.",
)


def write_page(path: Path, rows: Sequence[Row], facts: Mapping[str, Any], command: str) -> None:
    """Write the page in one move."""
    write_text(path, page(rows, facts, command))


def _shown(text: str) -> str:
    """`text` as it is, in HTML."""
    return html.escape(printable(text))


def page(rows: Sequence[Row], facts: Mapping[str, Any], command: str) -> str:
    """The HTML text."""
    head, body = table(rows)
    known = "; ".join(f"{key} {value}" for key, value in facts.items() if value not in (None, ""))
    lines = [f"<tr>{''.join(f'<td>{_shown(cell)}</td>' for cell in line)}</tr>" for line in body]
    notes = "".join(f"<li>{_shown(note)}</li>" for note in _NOTES)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>linsight bench</title><style>{_STYLE}</style></head>
<body>
<h1>linsight bench</h1>
<p><code>{_shown(command)}</code></p>
<p>{_shown(known)}</p>
<figure>{svg(rows)}</figure>
<table><thead><tr>{"".join(f"<th>{_shown(cell)}</th>" for cell in head)}</tr></thead>
<tbody>
{chr(10).join(lines)}
</tbody></table>
<ul>{notes}</ul>
<script>{_SCRIPT}</script>
</body>
</html>
"""
