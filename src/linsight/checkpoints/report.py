"""The report of a load, and the table of what did not fit."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ROWS = 12  # rows of the table; the rest is counted


class Mismatch(NamedTuple):
    """One tensor that does not fit. Shapes are empty strings where there is no such tensor."""

    key: str
    checkpoint: str
    model: str
    problem: str


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """The report of `load_published`.

    source: the file, address or "state dict".
    wrapper: the entries under which the weights were found, as in "model" or "state_dict_ema".
    loaded: keys of the model that were filled.
    resized: position tables that were resampled, with both grids.
    dropped: keys of the file that were left out, with the reason.
    kept: keys of the model that were left as they are.
    mismatched: what did not fit; empty unless `strict=False`.
    adapted: first convolutions for images of other channels, and weights that were made whole of their parts.
    converted: tensors that were of another precision than the model.
    infinite: keys of the model whose new values are not all finite, and how many of them are nan or infinite.
    """

    source: str
    wrapper: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    adapted: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    infinite: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f", entry '{self.wrapper}'" if self.wrapper else ""
        lines = [f"loaded {len(self.loaded)} tensors from {self.source}{where}"]
        titles = {"infinite": "nan or infinite"}
        for name in ("resized", "adapted", "converted", "infinite", "dropped", "kept"):
            found: tuple[str, ...] = getattr(self, name)
            if found:
                lines.append(f"{titles.get(name, name)}: {shortened(found, ', ')}")
        if self.mismatched:
            lines.append(table(self.mismatched))
        return "\n".join(lines)


def shape_text(shape: Iterable[int]) -> str:
    """A shape in words: `(192, 3, 16, 16)` is "192x3x16x16", a scalar "1"."""
    return "x".join(map(str, shape)) or "1"


def shortened(items: Sequence[str], separator: str) -> str:
    """The first `ROWS` items, and how many more there are."""
    more = [f"... and {len(items) - ROWS} more"] if len(items) > ROWS else []
    return separator.join([*items[:ROWS], *more])


def table(rows: Sequence[Mismatch]) -> str:
    """Aligned plain text, one line for each tensor."""
    header = Mismatch("key", "checkpoint", "model", "what is wrong")
    shown = [header, *(Mismatch(*(cell or "-" for cell in row)) for row in rows[:ROWS])]
    widths = [max(len(row[column]) for row in shown) for column in range(3)]
    lines = []
    for row in shown:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        lines.append(" | ".join([*cells, row.problem]))
    if len(rows) > ROWS:
        lines.append(f"... and {len(rows) - ROWS} more")
    return "\n".join(lines)
