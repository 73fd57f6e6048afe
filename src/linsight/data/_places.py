"""Places that a user may call data: each knows its splits, and opens one of them."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from linsight.errors import LinsightError
from linsight.recipe import Recipe

from . import sources
from ._archives import SUFFIXES, Archive
from ._layout import body, role, splits, unwrapped
from ._parquet import check_files, hugging_face, hugging_face_splits, parquet, split_files
from .sources import Source
from .trees import Tree, count, shown, some, walk

_ITERABLE = ("hfids", "tfds", "wds")


class Place(Protocol):
    """A place with data.

    splits: their names, in order; none where there is one body of images.
    exact: True where splits have the names of a library, and may be taken in parts, as in train[:10%].
    notes: what a user should hear of.
    """

    splits: Sequence[str]
    exact: bool
    notes: tuple[str, ...]

    def open(self, split: str | None) -> Source:
        """The images of a split, or of all where there are no splits."""
        ...


class Digits:
    """The digits of scikit-learn."""

    splits: Sequence[str] = ()
    exact = False
    notes: tuple[str, ...] = ()

    def open(self, split: str | None) -> Source:
        """See `Place`."""
        return sources.digits()


class Torchvision:
    """A data set of torchvision, as timm calls it: `torch/cifar10`."""

    splits: Sequence[str] = ("train", "validation", "test")
    exact = True
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, folder: str | None) -> None:
        self.name, self.folder = name, folder

    def open(self, split: str | None) -> Source:
        """See `Place`."""
        return sources.torchvision(self.name, self.folder, split or "train")


class Hub:
    """A data set of Hugging Face."""

    exact = True
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe = name, recipe
        self.splits: Sequence[str] = hugging_face_splits(name)

    def open(self, split: str | None) -> Source:
        """See `Place`."""
        recipe = self.recipe
        return hugging_face(self.name, recipe.data_dir, split or "train", recipe.image_key, recipe.label_key)


class Parquet:
    """Parquet files below `folder`, by split: all in "" where there is none."""

    exact = True

    def __init__(
        self, label: str, folder: pathlib.Path, files: Mapping[str, list[str]], notes: list[str], recipe: Recipe
    ) -> None:
        self.label, self.folder, self.files, self.recipe = label, folder, files, recipe
        self.notes: tuple[str, ...] = tuple(notes)
        self.splits: Sequence[str] = [split for split in files if split]
        for names in files.values():
            check_files(label, [folder / name for name in names])

    def open(self, split: str | None) -> Source:
        """See `Place`."""
        split = split or "train"
        names = self.files.get(split.partition("[")[0]) or self.files[""]
        recipe = self.recipe
        paths = [self.folder / name for name in names]
        return parquet(self.label, paths, recipe.data_dir, split, recipe.image_key, recipe.label_key)


class Pictures:
    """Images in a folder or in an archive."""

    exact = False

    def __init__(self, tree: Tree, recipe: Recipe, packed: Archive | None = None) -> None:
        self.tree, self.packed = tree, packed
        named = [name for name in (recipe.train_split, recipe.val_split) if name and name != "train"]
        found, beside = splits(tree, named)
        self.splits: Sequence[str] = found
        self.notes: tuple[str, ...] = tuple(filter(None, [beside, *tree.notes]))

    def open(self, split: str | None) -> Source:
        """See `Place`."""
        found = body(self.tree, split or "")
        if self.packed is not None:
            return sources.archive(self.packed, self.tree.inside, found)
        return sources.folder(pathlib.Path(self.tree.label), found)


class Archives:
    """A folder with an archive for each split: `files` by split."""

    exact = False
    notes: tuple[str, ...] = ()

    def __init__(self, files: Mapping[str, pathlib.Path]) -> None:
        self.files = files
        self.splits: Sequence[str] = list(files)

    def open(self, split: str | None) -> Source:
        """See `Place`."""
        packed = Archive(self.files[split or "train"])
        tree = _tree_of(packed)
        tops = {name.partition("/")[0] for name in tree.pictures}
        inner = tops.pop() if len(tops) == 1 else ""  # train.tar with all in train/
        return sources.archive(
            packed, tree.inside, body(tree, inner if inner and role(inner) == role(split or "") else "")
        )


def locate(recipe: Recipe) -> Place:
    """The place that a recipe calls its data.

    Raises:
        LinsightError: nothing there, or nothing that is read.
    """
    data = recipe.data
    if data == "digits":
        return Digits()
    prefix, slash, rest = data.partition("/")
    there = os.path.exists(os.path.expanduser(data))
    path = pathlib.Path(os.path.expanduser(data))  # as it is, where there is no such user
    if slash and not there:
        if prefix in _ITERABLE:
            raise LinsightError(f"'{data}' is read as a stream: use data in random access (a folder, a tar, hfds/)")
        if prefix == "torch":
            return Torchvision(data, recipe.data_dir)
        if prefix == "hfds":
            return _of_path(pathlib.Path(rest), recipe) if os.path.exists(rest) else Hub(rest, recipe)
    if not there or "\0" in data:
        raise LinsightError(f"no such data folder: {shown(data)}")
    return _of_path(path, recipe)


def _of_path(path: pathlib.Path, recipe: Recipe) -> Place:
    if path.is_dir():
        return _of_folder(path, recipe)
    if not path.is_file():
        raise LinsightError(f"{shown(path)} is no file and no folder, but a pipe or a device")
    if path.suffix.lower() == ".parquet":
        return Parquet(str(path), path.parent, {"": [path.name]}, [], recipe)
    if path.suffix.lower() not in SUFFIXES:
        raise LinsightError(
            f"{shown(path)} is no data: give a folder, a .tar, .zip or .parquet, or a name: torch/cifar10"
        )
    packed = Archive(path)
    return Pictures(_tree_of(packed), recipe, packed)


def _of_folder(path: pathlib.Path, recipe: Recipe) -> Place:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        raise LinsightError(f"{shown(path)} was written by save_to_disk: write it with to_parquet instead")
    tree = walk(path)
    tables = [name for name in tree.others if name.lower().endswith(".parquet")]
    if tables and tree.pictures:
        raise LinsightError(
            f"{shown(path)} has {count(len(tree.pictures), 'image', 'images')} and "
            f"{count(len(tables), 'Parquet file', 'Parquet files')}: give the folder of the "
            f"ones or the others as the data, or move {some(tables)} out"
        )
    if tables:
        return Parquet(str(path), path, *split_files(str(path), tables), recipe)
    packed = [name for name in tree.others if "/" not in name and name.lower().endswith(SUFFIXES)]
    if packed and not tree.pictures:
        return _of_archives(path, packed)
    return Pictures(tree, recipe)


def _of_archives(path: pathlib.Path, names: list[str]) -> Place:
    files: dict[str, pathlib.Path] = {}
    for name in names:
        split = name.partition(".")[0]
        if not role(split):
            raise LinsightError(
                f"{shown(path)} has no image, but archives: call them by their splits, train.tar and val.tar, or give "
                f"{shown(path / name)} alone"
            )
        if split in files:
            raise LinsightError(f"{shown(path)} has {some([files[split].name, name])}, two archives of one split")
        files[split] = path / name
    return Archives(files)


def _tree_of(packed: Archive) -> Tree:
    """The files of an archive; raises a LinsightError where labels are files beside images, as 000.jpg and 000.cls."""
    tree = unwrapped(packed.tree())
    labels = [name for name in tree.others if name.endswith((".cls", ".json")) and "/" not in name]
    if labels and tree.pictures and all("/" not in name for name in tree.pictures):
        raise LinsightError(
            f"{shown(tree.label)} is a WebDataset ({some([tree.pictures[0], labels[0]])}), which is read as a stream: "
            "unpack it into a folder for each class, or write it as Parquet"
        )
    return tree
