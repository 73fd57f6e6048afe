"""Images to predict: files, folders, archives and Parquet files in any mixture, in order, each once."""

import bisect
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from linsight.errors import ImageError, LinsightError

from ._archives import SUFFIXES, Archive
from ._parquet import Table, hugging_face_images, hugging_face_splits
from ._sections import Files, Members, Rows, Section
from .sources import Source, first_line
from .trees import count, in_order, shown, some, walk

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HUB = "hfds/"
_NOTES = 5  # lines about what was left out, before they are counted


class Inputs(Source):
    """Images of several places, in order. Its classes are nobody's, and its targets their own indices.

    notes: what was left out.  torn: lines about archives whose ends are damaged.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, sections: Sequence[Section], notes: tuple[str, ...], torn: tuple[str, ...]) -> None:
        self.sections = [section for section in sections if len(section)]
        self.ends = list(itertools.accumulate(map(len, self.sections)))
        self.targets: Any = range(len(self))
        self.notes, self.torn = notes, torn

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def stored(self, index: int) -> Any:
        """See `Source`."""
        section, own = self._find(index)
        try:
            return section.open(own)
        except Exception as error:  # of files that are gone, and of damaged archives and tables
            raise ImageError(f"{self.name(index)}: {first_line(error)}") from error

    def label(self, index: int) -> str:
        """The name of an image in the result."""
        section, own = self._find(index)
        return section.label(own)

    def name(self, index: int) -> str:
        """See `Source`."""
        return shown(self.label(index))[1:-1]

    def marks(self) -> tuple[dict[str, str], dict[str, str]]:
        """By place, the count and a digest of its images, and a digest of the times of their files."""
        what: dict[str, str] = {}
        times: dict[str, str] = {}
        for number, section in enumerate(self.sections, 1):
            name = f"{number}. {shown(section.place)}"
            digest, times[name] = section.marks()
            what[name] = f"{count(len(section), 'image', 'images')} ({digest})"
        return what, times

    def _find(self, index: int) -> tuple[Section, int]:
        place = bisect.bisect_right(self.ends, index)
        return self.sections[place], index - (self.ends[place - 1] if place else 0)


def open_inputs(
    places: Sequence[str | pathlib.Path], *, image_key: str | None = None, result: pathlib.Path | None = None
) -> Inputs:
    """The images of files, folders, .tar, .zip and .parquet files, and data sets of Hugging Face (`hfds/NAME`).

    Of a folder, its images; where it has none, its archives and Parquet files. What is given twice is taken once.

    Args:
        places: paths, which may have `*`, `?`, `[a-z]`, `**` and `{000..099}`.
        image_key: the column of images, where it cannot be told.
        result: a file that is none of the data.

    Raises:
        LinsightError: a place that is not there, has no image or cannot be read.
    """
    return _Opening(image_key, result).open([place for given in places for place in expanded(str(given))])


class _Opening:
    """Sections and lines that are gathered while places are opened."""

    def __init__(self, image_key: str | None, result: pathlib.Path | None) -> None:
        self.image_key, self.result = image_key, result
        self.sections: list[Section] = []
        self.notes: list[str] = []
        self.torn: list[str] = []
        self.seen: set[str] | None = None  # paths, where there are several places
        self.twice = 0

    def open(self, places: Sequence[str]) -> Inputs:
        """The images of places that are there."""
        places = [place for place in places if not self._is_result(place)]
        self.seen = set() if len(places) > 1 else None
        for loose, group in itertools.groupby(places, _is_picture):
            if loose:
                files = list(filter(self._new, group))
                self.sections.append(Files("image files" if files[1:] else "".join(files), "", files))
                continue
            for place in group:
                self._open(place)
        more = len(self.notes) - _NOTES
        if more > 0:
            self.notes[_NOTES:] = [f"{count(more, 'line', 'lines')} more about what was left out"]
        if self.twice:
            self.notes.append(
                f"{count(self.twice, 'image or file', 'images and files')} given more than once: taken once"
            )
        inputs = Inputs(self.sections, tuple(self.notes), tuple(self.torn))
        if not len(inputs):
            why = f" ({self.notes[0]})" if self.notes else ""
            raise LinsightError(f"no image in {some(places)}{why}" if places else "no image is given: name some")
        return inputs

    def _open(self, place: str) -> None:
        if not os.path.exists(place):
            self._hub(place.removeprefix(_HUB))
        elif os.path.isdir(place):
            self._folder(pathlib.Path(place))
        elif not os.path.isfile(place):
            raise LinsightError(f"{shown(place)} is no file and no folder, but a pipe or a device")
        else:
            self._packed(pathlib.Path(place))

    def _folder(self, folder: pathlib.Path) -> None:
        tree = walk(folder)
        tree.others = [name for name in tree.others if not self._is_result(folder / name)]
        packed = [] if tree.pictures else sorted(filter(is_packed, tree.others), key=in_order)
        tree.others = [name for name in tree.others if tree.pictures or not is_packed(name)]
        aside = [f"in {shown(folder)}: {line}" for line in (tree.left_out(), *tree.notes) if line]
        if not tree.pictures and not packed:
            raise LinsightError(f"no image in the folder {shown(folder)}{''.join(f' ({line})' for line in aside[:1])}")
        self.notes += aside
        base = str(folder) if str(folder) != "." else ""
        if self.seen is not None:
            tree.pictures = [name for name in tree.pictures if self._new(os.path.join(base, name))]
        self.sections.append(Files(str(folder), base, tree.pictures))
        for name in packed:
            self._packed(folder / name)

    def _packed(self, path: pathlib.Path) -> None:
        if not self._new(str(path)):
            return
        if path.suffix.lower() == ".parquet":
            table = Table(path, self.image_key)
            self.sections.append(Rows(str(path), table, len(table), str(path)))
            return
        archive = Archive(path, partly=True)
        if archive.torn:
            self.torn.append(f"{shown(path)}: {archive.torn}")
        tree = archive.tree()
        self.notes += [f"in {shown(path)}: {line}" for line in (tree.left_out(), *tree.notes) if line]
        self.sections.append(Members(archive, tree.pictures))

    def _hub(self, name: str) -> None:
        for split in hugging_face_splits(name):
            images = hugging_face_images(name, split, self.image_key)
            self.sections.append(Rows(f"{_HUB}{name}/{split}", images, len(images.rows)))

    def _new(self, path: str) -> bool:
        """True unless a path was given before."""
        if self.seen is None:
            return True
        whole = os.path.abspath(path)
        known = whole in self.seen
        self.twice += known
        self.seen.add(whole)
        return not known

    def _is_result(self, path: str | pathlib.Path) -> bool:
        """True for the result, and for what lies in the folder of its parts."""
        if self.result is None:
            return False
        own, whole = os.path.abspath(self.result), os.path.abspath(path)
        return whole == own or f"{whole}{os.sep}".startswith(f"{own}.parts{os.sep}")


def is_packed(name: str) -> bool:
    """True for the names of archives and of Parquet files."""
    return name.lower().endswith((*SUFFIXES, ".parquet"))


def _is_picture(place: str) -> bool:
    return os.path.isfile(place) and not is_packed(place)


def expanded(given: str) -> Iterator[str]:
    """The places that a pattern stands for, in the order of their numbers; a place that is there stands for itself."""
    place = os.path.expanduser(given)
    if os.path.exists(place):
        yield place
        return
    if given.startswith(_HUB):
        rest = given.removeprefix(_HUB)
        yield rest if os.path.exists(rest) else given
        return
    found = _RANGE.search(place)
    if found:
        first, last = map(int, found.groups())
        for number in range(first, last + 1):
            yield from expanded(f"{place[: found.start()]}{number:0{len(found[1])}}{place[found.end() :]}")
        return
    matches = sorted(glob.glob(place, recursive=True), key=in_order) if glob.has_magic(place) else []
    if not matches:
        raise LinsightError(f"no such image, folder or archive: {shown(given)}")
    yield from matches
