"""Kinds of files: which are pictures, and in what words the others are left out."""

import collections
import functools
import os
from collections.abc import Iterable

from PIL import Image

# Formats whose names Pillow knows without being able to decode them, or only by another program.
_NAMED_ONLY = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_SHOWN = 5


@functools.cache
def extensions() -> frozenset[str]:
    """The extensions of pictures, in lower case with their dot: those that the installed Pillow decodes."""
    registered = Image.registered_extensions()
    return frozenset(
        suffix for suffix, kind in registered.items() if kind in Image.OPEN and kind not in _NAMED_ONLY
    ) | {".btf", ".tf8"}


def is_picture(name: str | os.PathLike[str]) -> bool:
    """True where a file is a picture by its extension."""
    return suffix_of(name) in extensions()


def suffix_of(name: str | os.PathLike[str]) -> str:
    """The extension of a name in lower case, or ""."""
    return os.path.splitext(os.fspath(name))[1].lower()


def left_out(names: Iterable[str | os.PathLike[str]]) -> str:
    """A line that counts files which are no pictures by their extensions; "" where there are none.

    >>> left_out(["a.txt", "b.txt", "c.csv"])
    '3 files of other kinds left out: .txt 2, .csv 1'
    """
    counts = collections.Counter(suffix_of(name) or "without extension" for name in names)
    total = counts.total()
    if not total:
        return ""
    shown = [f"{kind} {count}" for kind, count in counts.most_common(_SHOWN)]
    files = "1 file of another kind" if total == 1 else f"{total} files of other kinds"
    return f"{files} left out: {', '.join(shown)}{', ...' if len(counts) > _SHOWN else ''}"
