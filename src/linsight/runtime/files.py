"""Files that are whole or absent: written beside their place, then moved into it."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

from linsight.errors import LinsightError


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path in the same folder, which becomes `path` if the block ends well."""
    # the suffix stays last: writers of figures go by it
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write `text` to `path` in one move."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON, which has no word for what is no number: a LinsightError where there is one."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise LinsightError(f"a value that is no number cannot be written as JSON ({error})") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` in one move."""
    write_text(path, to_json(value, indent=2) + "\n")
