"""Files that are whole or absent: written beside their place, then moved into it."""

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any


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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` in one move."""
    write_text(path, json.dumps(value, indent=2) + "\n")
