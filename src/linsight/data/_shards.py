"""Shards of WebDataset: tars of samples, whose files have one name up to the first dot, read where they lie.

An index of each shard, made once, says where its images are and of which class. So shards are data in random access.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from linsight.errors import LinsightError
from linsight.runtime.files import replacing, to_json, user_cache
from linsight.runtime.memory import free_memory

from ._archives import Archive
from ._layout import plain, sort_classes
from ._parquet import LABELS
from ._sections import Names, digests
from .kinds import extensions
from .random import TOGETHER
from .sources import Reading, Source
from .trees import count, shown

CLASSES = ("classes.txt", "classnames.txt")  # names of classes, a line each
_FORMAT = 1
_LOOKED_AT = 64  # members of a tar that tell whether it is a shard
_MOST_CLASSES = 10**6
_LONGEST = 200  # letters of the name of a class
_Parts = dict[str, tuple[int, int]]  # of a sample: by extension, where its bytes begin, and how many they are


class Index(NamedTuple):
    """The samples of a shard, in order.

    names: of their images.  spans: `(samples, 2)`, where their bytes begin, and how many they are.
    labels: the class of each, a name or a number, "" where it has none.  lacking: samples without an image.
    """

    names: Sequence[str]
    spans: Any
    labels: Sequence[str]
    lacking: int


def is_shard(path: pathlib.Path) -> bool:
    """True for a tar of samples with labels beside their images: by its first members."""
    try:
        with tarfile.open(path, "r:") as file:
            names = [member.name.removeprefix("./") for member in itertools.islice(file, _LOOKED_AT) if member.isfile()]
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return False  # who reads it as an archive says why
    found = _samples(dict.fromkeys(names, (0, 0)))
    return any(
        any(map(_is_image, parts)) and ("cls" in parts or ("/" not in name and parts.keys() & {"json", "txt"}))
        for name, parts in found.items()
    )


def open_shards(
    label: str, paths: Sequence[pathlib.Path], names: pathlib.Path | None, keys: "Keys", *, ahead: bool
) -> Source:
    """The images of shards as a source.

    Args:
        label: what a user called them.
        paths: of the shards, in order.
        names: a file with the name of each class, in the order of their numbers; None: numbers are names.
        keys: of image and label in a sample.
        ahead: shards are gone through a few at a time, and may be read ahead.

    Raises:
        LinsightError: a shard that cannot be read, several images in a sample, labels that cannot be used.
    """
    found = [_indexed(path, keys) for path in paths]
    lengths = [len(index.names) for index in found]
    labels = [text for index in found for text in index.labels]
    targets, classes = _classes(label, labels, names)
    notes = []
    if lacking := sum(index.lacking for index in found):
        notes.append(f"{count(lacking, 'sample', 'samples')} of {shown(label)} without an image left out")
    source = Reading(Shards(paths, found, ahead), targets, classes, tuple(notes))
    source.shards = np.repeat(np.arange(len(paths), dtype=np.int32), lengths)  # type: ignore[assignment]
    return source


class Keys(NamedTuple):
    """Names of what is used of a sample: the extension of its image, and that of its label or its key in JSON."""

    image: str | None = None
    label: str | None = None


class Shards:
    """The images of shards, by place."""

    def __init__(self, paths: Sequence[pathlib.Path], found: Sequence[Index], ahead: bool) -> None:
        self.paths = [str(path) for path in paths]
        self.names = Names(name for index in found for name in index.names)
        self.spans = np.concatenate([index.spans for index in found])
        self.ends = np.cumsum([len(index.names) for index in found])
        sizes = sorted(map(os.path.getsize, self.paths), reverse=True)
        # what is read ahead is to be there still when it is used
        self.ahead = ahead and hasattr(os, "posix_fadvise") and sum(sizes[:TOGETHER]) < free_memory().bytes / 2
        self._begun: set[int] = set()

    def open(self, index: int) -> BinaryIO:
        """An image, undecoded."""
        shard = self._shard(index)
        if self.ahead and shard not in self._begun:
            self._begun.add(shard)
            with open(self.paths[shard], "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        start, size = self.spans[index].tolist()
        return Archive.cut(self.paths[shard], start, size)

    def filename(self, index: int) -> str:
        """The name of an image, behind that of its shard."""
        return f"{os.path.basename(self.paths[self._shard(index)])}!{self.names[index]}"

    def stamp(self) -> str:
        """A digest of the names of images, of the sizes of shards and of their times."""
        return " ".join(digests(self.paths, self.names.text, np.ascontiguousarray(self.spans).tobytes()))

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))


def _indexed(path: pathlib.Path, keys: Keys) -> Index:
    """The index of a shard: the one that is kept of this very file, or a new one, which is kept where it can be."""
    about = path.stat()
    known = to_json([_FORMAT, about.st_size, about.st_mtime_ns, *keys])
    kept = (
        user_cache("shards") / f"{hashlib.sha256(os.path.abspath(path).encode(errors='replace')).hexdigest()[:32]}.npz"
    )
    # of a damaged file, numpy raises anything
    with contextlib.suppress(Exception), kept.open("rb") as file, np.load(file, allow_pickle=False) as found:
        if str(found["known"]) == known:
            names, labels = (_unpacked(found[name].tobytes()) for name in ("names", "labels"))
            return Index(names, found["spans"], labels, int(found["lacking"]))
    index = _read(path, keys)
    packed = {name: np.frombuffer(_packed(getattr(index, name)), np.uint8) for name in ("names", "labels")}
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary:
            np.savez(temporary, known=known, spans=index.spans, lacking=index.lacking, **packed)  # type: ignore[arg-type]
    return index


def _packed(names: Sequence[str]) -> bytes:
    return "\0".join(names).encode("utf-8", "surrogatepass")


def _unpacked(data: bytes) -> list[str]:
    return data.decode("utf-8", "surrogatepass").split("\0")


def _read(path: pathlib.Path, keys: Keys) -> Index:
    samples = _samples(Archive(path).members)
    names, spans, labels, lacking = [], [], list[str](), 0
    with path.open("rb") as file:
        for name, parts in samples.items():
            image = _image_of(path, name, parts, keys.image)
            if not image:
                lacking += 1
                continue
            names.append(f"{name}.{image}")
            spans.append(parts[image])
            labels.append(_label_of(path, name, parts, keys.label, file))
    if not names:
        raise LinsightError(f"{shown(path)} has no sample with an image")
    if not any(labels):
        raise LinsightError(
            f"{shown(path)} has no label in its samples, as in {shown(f'{name}.cls')}: name its file or its key in "
            "JSON with label_key="
        )
    return Index(names, np.array(spans, np.int64), labels, lacking)


def _samples(members: Mapping[str, tuple[int, int]]) -> dict[str, _Parts]:
    """The members of a tar by sample, and in it by extension: all behind the first dot, in lower case."""
    found: dict[str, _Parts] = {}
    for name, span in members.items():
        folder, slash, own = name.rpartition("/")
        stem, _, extension = own.partition(".")
        if stem and extension and not stem.startswith("__"):
            found.setdefault(f"{folder}{slash}{stem}", {})[extension.lower()] = span
    return found


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in extensions()


def _image_of(path: pathlib.Path, name: str, parts: _Parts, key: str | None) -> str:
    """The extension of the image of a sample, "" where it has none."""
    if key:
        return key if key in parts else ""
    images = [extension for extension in parts if _is_image(extension)]
    images = [extension for extension in images if "." not in extension] or images
    if len(images) > 1:
        raise LinsightError(
            f"{shown(f'{path}!{name}')} has several images ({', '.join(images)}): say which to use with image_key="
        )
    return images[0] if images else ""


def _label_of(path: pathlib.Path, name: str, parts: _Parts, key: str | None, file: BinaryIO) -> str:
    """The label of a sample, "" where it has none."""

    def content(extension: str) -> bytes:
        start, size = parts[extension]
        file.seek(start)
        return file.read(size)

    where = shown(f"{path}!{name}")
    if key and key in parts:
        return _checked(where, _text(where, content(key)))
    if not key and "cls" in parts:
        return _checked(where, _text(where, content("cls")))
    if "json" in parts:
        try:
            found = json.loads(content("json"))
        except (ValueError, RecursionError) as error:
            raise LinsightError(f"{where} has no readable JSON: {error}") from error
        values = found if isinstance(found, dict) else {}
        value = next((values[name] for name in ([key] if key else LABELS) if values.get(name) is not None), None)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int):
            return _checked(where, str(value).strip())
    if not key and "txt" in parts:
        return _checked(where, _text(where, content("txt")))
    return ""


def _text(where: str, content: bytes) -> str:
    """A label in a file of its own, with or without a mark of the encoding at its start."""
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:  # with a sign for what is damaged, two names might be one
        raise LinsightError(f"the label of {where} is no class, but a text that is no UTF-8: {error}") from error


def _checked(where: str, text: str) -> str:
    if re.fullmatch(r"-\d+", text):
        return ""
    if len(text) > _LONGEST or any(c in text for c in "\n\r\0"):
        raise LinsightError(f"the label of {where} is no class, but a text ({text.split(chr(10))[0][:40]} ...)")
    return text


def _classes(label: str, labels: Sequence[str], names: pathlib.Path | None) -> tuple[list[int], tuple[str, ...]]:
    """The class of each sample, -1 where it has none, and the classes: those of a file, or those there are."""
    known = set(labels) - {""}
    numbers = all(text.isdecimal() for text in known)
    if names is not None:
        classes = _lines(names)
    elif numbers:
        most = max(map(int, known), default=0)
        if most >= _MOST_CLASSES:
            raise LinsightError(f"{shown(label)} has a sample of class {most}: these are no numbers of classes")
        classes = tuple(map(str, range(most + 1)))
    else:
        classes = sort_classes(shown(label), known)
    if numbers:
        place = {text: int(text) for text in known}
        wrong = [text for text, number in place.items() if number >= len(classes)]
    else:
        by_name = {name: number for number, name in enumerate(classes)}
        place = {text: by_name.get(plain(text), -1) for text in known}
        wrong = [text for text, number in place.items() if number < 0]
    if wrong:
        raise LinsightError(f"{shown(label)} has the class {shown(wrong[0])}, which is not in {shown(names)}")
    return [place.get(text, -1) for text in labels], classes


def _lines(path: pathlib.Path) -> tuple[str, ...]:
    """The lines of a file of class names; names that are there more than once have their number behind them."""
    try:
        lines = [plain(line.strip()) for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, ValueError) as error:
        raise LinsightError(f"{shown(path)} cannot be read: {error}") from error
    if not all(lines):
        raise LinsightError(f"{shown(path)} has an empty line, {lines.index('') + 1}: write the name of a class there")
    many = {name for name in lines if lines.count(name) > 1} if len(set(lines)) < len(lines) else set[str]()
    return tuple(f"{name} ({number})" if name in many else name for number, name in enumerate(lines))


def class_names(folders: Iterable[pathlib.Path]) -> pathlib.Path | None:
    """The file of class names in the first of some folders that has one."""
    return next((folder / name for folder in folders for name in CLASSES if (folder / name).is_file()), None)
