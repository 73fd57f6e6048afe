"""Bags with labels: folders of classes, of files that `Bag.save` wrote."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from linsight.data import role
from linsight.data.random import hold_out
from linsight.data.trees import hidden, in_order
from linsight.errors import LinsightError
from linsight.runtime.places import located

Kept = TypeVar("Kept")

_HELD = 0.2  # of bags that have no split to be judged by


@dataclasses.dataclass(frozen=True)
class LabelledBags:
    """Files of bags, the class of each, and the names of the classes. Features are read when they are asked for.

    width: channels of the features.  label: where the bags are from, as people are told it.
    """

    files: Sequence[pathlib.Path]
    targets: Sequence[int]
    classes: tuple[str, ...]
    width: int
    label: str

    def __len__(self) -> int:
        return len(self.files)

    def features(self, index: int) -> Tensor:
        """`(N, F)`, float32.

        Raises:
            LinsightError: the file is no bag any more, or has what is no number.
        """
        path = self.files[index]
        found = _read(path, lambda file: file.get_tensor("features").float())
        if not bool(found.isfinite().all()):
            raise LinsightError(f"'{path}' has features that are no numbers: make it anew, or remove it")
        return found


def open_bags(folder: str | os.PathLike[str]) -> tuple[LabelledBags, LabelledBags]:
    """The bags of a folder to learn from, and those to be judged by.

    They lie in folders of classes, in folders of splits, as train/ and val/, or alone: then a fifth of each class is
    held out, always the same. Where there is no split for validation, that for tests judges.

    Raises:
        LinsightError: there is no such folder, fewer than two classes, no bag to learn from or to be judged by, a class
            to be judged by that is not learned, or a file that is no bag, or is of another width.
    """
    root = located(folder)
    if not root.is_dir():
        raise LinsightError(f"no such folder of bags: '{root}'")
    folders = _folders(root)
    splits = {role(path.name): path for path in folders}
    for path in folders:
        if role(path.name) and (other := splits[role(path.name)]) != path:
            raise LinsightError(f"'{root}' has two folders for one split, '{path.name}' and '{other.name}': keep one")
    if not any(splits):
        files, targets, classes = _classes(root)
        parts = hold_out(targets, _HELD)
        lonely = [name for place, name in enumerate(classes) if place not in (targets[i] for i in parts[0])]
        if lonely:
            raise LinsightError(
                f"'{root / lonely[0]}' has one bag, which is held out: add more, or give train/ and val/"
            )
        width = _width(files)
        rest, held = (
            LabelledBags([files[i] for i in some], [targets[i] for i in some], classes, width, label)
            for some, label in zip(parts, (root.name, f"a fifth of {root.name}"), strict=True)
        )
        return rest, held
    if None in splits:
        odd = next(path.name for name, path in splits.items() if name)
        raise LinsightError(f"'{root}' has the class '{splits[None].name}' beside the split '{odd}': put it into that")
    learned, judging = splits.get("train"), splits.get("validation") or splits.get("test")
    if learned is None or judging is None:
        lacks = "train to learn from" if learned is None else "val to be judged by"
        raise LinsightError(
            f"'{root}' has no folder {lacks}, beside {', '.join(sorted(p.name for p in splits.values()))}"
        )
    files, targets, classes = _classes(learned)
    others, theirs, known = _classes(judging, least=1)
    if odd_ones := sorted(set(known) - set(classes)):
        raise LinsightError(f"'{judging / odd_ones[0]}' is a class that '{learned}' has no bag of")
    width = _width([*files, *others])
    there = [classes.index(known[target]) for target in theirs]
    return (
        LabelledBags(files, targets, classes, width, learned.name),
        LabelledBags(others, there, classes, width, judging.name),
    )


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted((path for path in _listed(root) if path.is_dir()), key=lambda path: in_order(path.name))


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return [path for path in folder.iterdir() if not hidden(path.name)]
    except OSError as error:
        raise LinsightError(f"'{folder}' cannot be read: {error.strerror}") from error


def _classes(folder: pathlib.Path, least: int = 2) -> tuple[list[pathlib.Path], list[int], tuple[str, ...]]:
    """Files, classes of these, and the names of the classes that have a file."""
    found = {path.name: sorted(_bags(_listed(path)), key=lambda file: in_order(file.name)) for path in _folders(folder)}
    found = {name: files for name, files in found.items() if files}
    if len(found) < least:
        told = f"only of the class '{next(iter(found))}'" if found else "of no class"
        raise LinsightError(
            f"'{folder}' has bags {told}: give {least} or more folders of classes, with files of 'linsight slide --bag'"
        )
    pairs = [(file, place) for place, files in enumerate(found.values()) for file in files]
    return [file for file, _ in pairs], [place for _, place in pairs], tuple(found)


def _bags(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    return [path for path in paths if path.suffix.lower() == ".safetensors" and not path.is_dir()]


def _width(files: Sequence[pathlib.Path]) -> int:
    """The channels of all bags, by the heads of their files."""
    width = 0
    for path in files:
        shape = tuple(_read(path, lambda file: file.get_slice("features").get_shape()))
        if len(shape) != 2 or not all(shape):
            raise LinsightError(f"'{path}' has features of shape {shape}, where a bag has (tiles, channels)")
        if width not in (0, shape[1]):
            raise LinsightError(f"'{path}' has features of {shape[1]} channels, and '{files[0]}' of {width}")
        width = shape[1]
    return width


def _read(path: pathlib.Path, take: Callable[..., Kept]) -> Kept:
    try:
        with safe_open(path, "pt") as file:
            return take(file)
    except FileNotFoundError:
        raise LinsightError(f"'{path}' is not there, or is a broken link") from None
    except (SafetensorError, OSError, LookupError) as error:
        raise LinsightError(f"'{path}' is no bag of tiles: make one with 'linsight slide --bag'") from error
