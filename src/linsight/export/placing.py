"""A file that may have others beside it, whole or absent."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from linsight.runtime.files import writing


@contextlib.contextmanager
def placing(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside `path`; what is in that is moved if the block ends well.

    Whatever keeps it from being written is a LinsightError of one line.
    """
    folder = path.with_name(f".linsight-{uuid.uuid4().hex[:8]}")
    try:
        with writing(path):
            folder.mkdir()
            yield folder / path.name
            # the file itself comes last: with it, all are there
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
