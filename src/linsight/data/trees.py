"""A walk over a folder of images: one for training, evaluation and prediction."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from linsight.errors import LinsightError

from .kinds import extensions, left_out

# Files and folders that systems and programs leave behind, beside those whose names begin with a dot.
_SYSTEM = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
}
# What a walk finds beside files and folders: one, and several.
_LEFT_OUT = {
    "broken": ("broken link", "broken links"),
    "circle": ("link to a folder that was entered already", "links to folders that were entered already"),
    "special": ("pipe or device", "pipes and devices"),
}
_SHOWN = 3
_NUMBER = re.compile(r"[0-9]+")


@dataclasses.dataclass
class Tree:
    """The files of a folder or an archive, by their names below it, with "/" between folders, in order.

    label: what a user called it.
    pictures, others: files that are images by their extension, and those that are not.
    folders: all folders, those without files too.
    notes: what was left out, for a reason other than its extension.
    inside: the folder of an archive that it is the tree of, with a "/" behind it.
    """

    label: str
    pictures: list[str]
    others: list[str]
    folders: set[str]
    notes: list[str] = dataclasses.field(default_factory=list)
    inside: str = ""

    def left_out(self, top: str = "") -> str:
        """A line that counts what is no image below the folder `top`, "" where there is nothing."""
        return left_out(name for name in self.others if name.startswith(top and f"{top}/"))


def hidden(name: str) -> bool:
    """True for a file or a folder that is nobody's data: dot-files, and what systems leave behind."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def sort_tree(label: str, names: Iterable[str], folders: Iterable[str]) -> Tree:
    """A tree of the files `names`, in the order of their numbers, and of `folders`; hidden ones are left out."""
    pictures: list[str] = []
    others: list[str] = []
    known = extensions()
    found = set(folders)
    for name in names:
        folder, _, own = name.rpartition("/")
        found.add(folder)
        if not any(map(hidden, name.split("/"))):
            (pictures if os.path.splitext(own)[1].lower() in known else others).append(name)
    for folder in tuple(found):  # a folder is there with all that it lies in
        while (folder := folder.rpartition("/")[0]) and folder not in found:
            found.add(folder)
    found = {folder for folder in found if folder and not any(map(hidden, folder.split("/")))}
    return Tree(label, sorted(pictures, key=in_order), sorted(others), found)


def walk(folder: str | pathlib.Path) -> Tree:
    """The tree of a folder. A link to a folder is followed once, and never back to where it lies.

    Raises:
        LinsightError: a folder that cannot be read.
    """
    found: dict[str, list[str]] = {"file": [], "folder": [], **{kind: [] for kind in _LEFT_OUT}}
    for name, kind in _entries(str(folder)):
        found[kind].append(name)
    tree = sort_tree(str(folder), found["file"], found["folder"])
    tree.notes += [
        f"{count(len(found[kind]), *things)} left out: {some(found[kind])}"
        for kind, things in _LEFT_OUT.items()
        if found[kind]
    ]
    return tree


def in_order(name: str) -> tuple[str, str]:
    """A key that puts 10.png behind 9.png, as timm's readers do."""
    return _NUMBER.sub(_sized, name.lower()), name


def _sized(found: re.Match[str]) -> str:
    """A number behind the count of its digits, before any letter."""
    digits = found[0].lstrip("0")
    return f"\0{chr(len(digits))}{digits}"


def shown(name: object) -> str:
    """A name in quotes, on one line: what cannot be printed is written as in Python."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return f"'{text}'"


def count(number: int, one: str, several: str) -> str:
    """A number of things, in words."""
    return f"{number} {one if number == 1 else several}"


def some(names: Iterable[str]) -> str:
    """The first few names, in quotes."""
    names = list(names)
    return ", ".join(map(shown, names[:_SHOWN])) + (", ..." if names[_SHOWN:] else "")


def _entries(root: str) -> Iterator[tuple[str, str]]:
    """Each file and folder below `root` that is not hidden, by its relative name, and its kind."""
    followed: set[tuple[str, tuple[int, int]]] = set()
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset([_identity(os.stat(root))]))]
    while waiting:
        folder, above = waiting.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise LinsightError(
                f"cannot read the folder {shown(os.path.join(root, folder))}: {error.strerror}"
            ) from error
        for entry in entries:
            if hidden(entry.name):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            link = entry.is_symlink()
            try:
                if not entry.is_dir():
                    # a pipe or a device is no image: to open one may wait for ever
                    yield name, "file" if entry.is_file() else "broken" if link else "special"
                    continue
                own = _identity(os.stat(entry.path))
            except OSError:  # a link to itself
                yield name, "broken"
                continue
            if link:
                followed_by = (name.partition("/")[0], _identity(os.lstat(entry.path)))
                if own in above or followed_by in followed:
                    yield name, "circle"
                    continue
                followed.add(followed_by)
            yield name, "folder"
            waiting.append((name, above | {own}))


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino
