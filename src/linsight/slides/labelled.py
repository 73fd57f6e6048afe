"""Bags with labels: folders of classes, of files that `Bag.save` wrote."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from linsight.data.random import hold_out
from linsight.data.trees import hidden, in_order
from linsight.errors import LinsightError
from linsight.runtime.places import located

Kept = TypeVar("Kept")

_SUFFIX = ".safetensors"
_HELD = 0.2  # of bags that have no split to be judged by
_VAL = ("val", "valid", "validation", "test")


@dataclasses.dataclass(frozen=True)
class LabelledBags:
    """Files of bags, the class of each, and the names of the classes. Features are read when they are asked for."""

    files: Sequence[pathlib.Path]
    targets: Sequence[int]
    classes: tuple[str, ...]
    width: int

    def __len__(self) -> int:
        return len(self.files)

    def features(self, index: int) -> Tensor:
        """`(N, F)`, float32.

        Raises:
            LinsightError: the file is no bag, has another width than the others, or what is no number.
        """
        found = _read(self.files[index], lambda file: file.get_tensor("features").float())
        if found.ndim != 2 or not found.numel() or found.shape[1] != self.width:
            shape = tuple(found.shape)
            raise LinsightError(f"'{self.files[index]}' has features {shape}, where others have {self.width} channels")
        if not bool(found.isfinite().all()):
            raise LinsightError(f"'{self.files[index]}' has features that are no numbers: make it anew, or remove it")
        return found


def open_bags(folder: str | pathlib.Path) -> tuple[LabelledBags, LabelledBags]:
    """The bags of a folder to learn from, and those to be judged by.

    They lie in folders of classes, in the folders train/ and val/, or alone: then a fifth of each class is held out,
    always the same.

    Raises:
        LinsightError: there is no such folder, fewer than two classes, no bag to learn from or to be judged by, or a
            class that is in one split alone.
    """
    root = located(folder)
    if not root.is_dir():
        raise LinsightError(f"no such folder of bags: '{root}'")
    if not (root / "train").is_dir():
        files, targets, classes = _classes(root)
        rest, held = hold_out(targets, _HELD)
        width = _width(files[0])
        parts = [([files[i] for i in some], [targets[i] for i in some]) for some in (rest, held)]
        lonely = [name for place, name in enumerate(classes) if place not in parts[0][1]]
        if lonely:
            raise LinsightError(
                f"'{root / lonely[0]}' has one bag, which is held out: give train/ and val/, or more bags"
            )
        train, val = (LabelledBags(some, own, classes, width) for some, own in parts)
        return train, val
    beside = next((root / name for name in _VAL if (root / name).is_dir()), None)
    if beside is None:
        raise LinsightError(f"'{root}' has a folder train and none to be judged by: add {root / 'val'}")
    files, targets, classes = _classes(root / "train")
    others, theirs, known = _classes(beside)
    if odd := sorted(set(known) - set(classes)):
        raise LinsightError(f"'{beside / odd[0]}' is a class that '{root / 'train'}' has no bag of")
    width = _width(files[0])
    there = [classes.index(known[target]) for target in theirs]
    return LabelledBags(files, targets, classes, width), LabelledBags(others, there, classes, width)


def _classes(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[int], tuple[str, ...]]:
    names = sorted((path.name for path in folder.iterdir() if path.is_dir() and not hidden(path.name)), key=in_order)
    found = {
        name: sorted(folder.joinpath(name).glob(f"*{_SUFFIX}"), key=lambda path: in_order(path.name)) for name in names
    }
    found = {name: files for name, files in found.items() if files}
    if len(found) < 2:
        told = f"only of the class '{next(iter(found))}'" if found else "none"
        raise LinsightError(
            f"'{folder}' has bags {told}: give two or more folders of classes, with files of 'linsight slide --bag'"
        )
    pairs = [(file, place) for place, files in enumerate(found.values()) for file in files]
    return [file for file, _ in pairs], [place for _, place in pairs], tuple(found)


def _width(path: pathlib.Path) -> int:
    shape = _read(path, lambda file: file.get_slice("features").get_shape())
    if len(shape) != 2:
        raise LinsightError(f"'{path}' has features {tuple(shape)}, where a bag has (tiles, channels)")
    return int(shape[1])


def _read(path: pathlib.Path, take: Callable[..., Kept]) -> Kept:
    try:
        with safe_open(path, "pt") as file:
            return take(file)
    except (SafetensorError, OSError, LookupError) as error:
        raise LinsightError(f"'{path}' is no bag of tiles: make one with 'linsight slide --bag'") from error
