"""Files with a row for each image: .csv, .jsonl and .parquet."""

import csv
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from linsight.errors import LinsightError, MissingExtraError
from linsight.runtime.files import to_json

_CODED = {letter: rf"\u{letter:04x}" for letter in range(0xD800, 0xE000)}  # bytes of a name that are no text
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # by which a cell begins that a spreadsheet runs
_TOGETHER = 16384  # rows of a group of a Parquet file


class Row(NamedTuple):
    """The likeliest classes of an image, best first, with their probabilities, or why there are none.

    extra: arrays of float32 by their names, as asked for.
    """

    file: str
    classes: Sequence[str] = ()
    probabilities: Sequence[float] = ()
    error: str | None = None
    extra: Mapping[str, Any] = MappingProxyType({})


Write = Callable[[pathlib.Path, Iterable[Row], int, Sequence[str]], None]


def require_table(path: pathlib.Path, extra: Sequence[str]) -> None:
    """Raise unless `path` can be written with the arrays `extra`.

    Raises:
        LinsightError: it has another ending, or is a .csv, which holds no arrays.
        MissingExtraError: pyarrow is not installed.
    """
    if path.suffix.lower() not in WRITERS:
        if path.suffix.lower() == ".npy":
            raise LinsightError(f"'{path}': a .npy holds the map or features of one image: add --stream and --output")
        raise LinsightError(f"'{path}' has to end in {', '.join(WRITERS)}")
    if path.suffix.lower() == ".csv" and extra:
        raise LinsightError(f"a .csv has no place for {' and '.join(extra)}: let --out end in .parquet or .jsonl")
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def write_table(path: pathlib.Path, rows: Iterable[Row], top: int, extra: Sequence[str]) -> None:
    """Write `rows` into a file of the kind that its ending names. top: how many classes an image has at most."""
    WRITERS[path.suffix.lower()](path, rows, top, extra)


def shortest(values: Any) -> list[float]:
    """Numbers of float32 as those that are written in the fewest digits."""
    return [float(text) for text in np.asarray(values, np.float32).astype(str).tolist()]


def _csv(path: pathlib.Path, rows: Iterable[Row], top: int, extra: Sequence[str]) -> None:
    names = [f"{name}_{rank}" if rank > 1 else name for rank in range(1, top + 1) for name in ("class", "probability")]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", *names, "error"])
        for row in rows:
            pairs = zip(map(_cell, row.classes), row.probabilities, strict=True)
            cells: list[Any] = [cell for pair in pairs for cell in pair]
            cells += [""] * (len(names) - len(cells))
            name = _text(row.file)
            name = f"./{name}" if name.startswith(_FORMULA) else name
            table.writerow([name, *cells, _cell(row.error or "")])


def _jsonl(path: pathlib.Path, rows: Iterable[Row], top: int, extra: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        for row in rows:
            arrays = {name: None if row.error is not None else shortest(row.extra[name]) for name in extra}
            line = to_json({**_columns(row), **arrays}, ascii=False)
            file.write(line.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085") + "\n")


def _parquet(path: pathlib.Path, rows: Iterable[Row], top: int, extra: Sequence[str]) -> None:
    pa = _pyarrow()
    from pyarrow import parquet

    text, number = pa.string(), pa.float32()
    kinds = {"file": text, "class": text, "probability": number, "classes": pa.list_(text)}
    kinds |= {"probabilities": pa.list_(number), "error": text} | {name: pa.list_(number) for name in extra}
    schema = pa.schema(list(kinds.items()))
    with parquet.ParquetWriter(path, schema) as file:
        for part in _parts(rows, _TOGETHER if not extra else _TOGETHER // 16):
            columns = [_columns(row) | {name: row.extra.get(name) for name in extra} for row in part]
            arrays = [pa.array([row[name] for row in columns], kind) for name, kind in kinds.items()]
            file.write_table(pa.Table.from_arrays(arrays, schema=schema))


WRITERS: dict[str, Write] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}


def _columns(row: Row) -> dict[str, Any]:
    """The columns that tables with lists have."""
    bad = row.error is not None
    return {
        "file": _text(row.file),
        "class": None if bad else _text(row.classes[0]),
        "probability": None if bad else row.probabilities[0],
        "classes": None if bad else list(map(_text, row.classes)),
        "probabilities": None if bad else list(row.probabilities),
        "error": _text(row.error) if row.error is not None else None,
    }


def _cell(text: str) -> str:
    """A text which no spreadsheet takes for a formula."""
    text = _text(text)
    if not text.startswith(_FORMULA):
        return text
    try:
        float(text)  # a class may be called -1
    except ValueError:
        return f"'{text}"
    return text


def _text(text: str) -> str:
    """A text that can be written as UTF-8."""
    return text.translate(_CODED)


def _parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    rows = iter(rows)
    while part := list(itertools.islice(rows, size)):
        yield part


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError("pyarrow", "train", "writing Parquet files") from None
    return pyarrow
