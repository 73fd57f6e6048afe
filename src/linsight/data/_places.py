"""Places that a user may call data: each knows its splits, and opens one of them."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from linsight.errors import LinsightError
from linsight.recipe import Recipe

from . import sources
from ._archives import SUFFIXES, Archive
from ._layout import body, role, splits, unwrapped
from ._parquet import (
    check_files,
    count_rows,
    hub_table,
    hugging_face,
    hugging_face_splits,
    parquet,
    parquet_table,
    split_files,
)
from ._shards import Keys, class_names, is_shard, open_shards
from ._streams import Streamed
from .inputs import expanded
from .sources import Source
from .trees import Tree, count, shown, some, walk

# How timm calls data that it reads as streams, and what to give here.
_ITERABLE = {
    "tfds": "torch/, hfds/ or hfids/ have most of them",
    "wds": "give the shards themselves, a folder or 'train-{000..146}.tar'",
}


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
        self.name, self.label, self.recipe = name, name, recipe
        self.splits: Sequence[str] = hugging_face_splits(name)

    def open(self, split: str | None) -> Source:
        """See `Place`."""
        recipe = self.recipe
        return hugging_face(self.name, recipe.data_dir, split or "train", recipe.image_key, recipe.label_key)

    def table(self, split: str | None) -> tuple[Any, str]:
        """The rows of a split, and the folder of what they name."""
        return hub_table(self.name, self.recipe.data_dir, split or "train"), ""


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
        split, recipe = split or "train", self.recipe
        return parquet(self.label, self._paths(split), recipe.data_dir, split, recipe.image_key, recipe.label_key)

    def table(self, split: str | None) -> tuple[Any, str]:
        """The rows of a split, and the folder of what they name."""
        split = split or "train"
        return parquet_table(self.label, self._paths(split), self.recipe.data_dir, split), str(self.folder)

    def _paths(self, split: str) -> list[pathlib.Path]:
        names = self.files.get(split.partition("[")[0]) or self.files[""]
        return [self.folder / name for name in names]


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


class Shards:
    """Shards of WebDataset below `folder`, by split: all in "" where there is none."""

    exact = False

    def __init__(
        self, label: str, folder: pathlib.Path, files: Mapping[str, list[str]], notes: Sequence[str], recipe: Recipe
    ) -> None:
        self.label, self.folder, self.files, self.recipe = label, folder, files, recipe
        self.notes: tuple[str, ...] = tuple(notes)
        self.splits: Sequence[str] = [split for split in files if split]

    def open(self, split: str | None) -> Source:
        """See `Place`."""
        recipe, names = self.recipe, self.files[split or ""]
        paths = [self.folder / name for name in names]
        keys = Keys(*(key.lstrip(".") if key else None for key in (recipe.image_key, recipe.label_key)))
        named = class_names(dict.fromkeys([self.folder, *(path.parent for path in paths)]))
        return open_shards(self.label, paths, named, keys, ahead=recipe.order == "shards")


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
        tree = unwrapped(packed.tree())
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
            raise LinsightError(f"{shown(data)} is read as a stream by timm, and not here: {_ITERABLE[prefix]}")
        if prefix == "hfids":
            return _stream(rest, recipe)
        if prefix == "torch":
            return Torchvision(data, recipe.data_dir)
        if prefix == "hfds":
            return _of_path(pathlib.Path(rest), recipe) if os.path.exists(rest) else Hub(rest, recipe)
    if not there and path.suffix.lower() == ".tar" and any(letter in data for letter in "{*?["):
        return _of_pattern(data, recipe)
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
    if path.suffix.lower() == ".tar" and is_shard(path):
        return Shards(str(path), path.parent, {"": [path.name]}, [], recipe)
    packed = Archive(path)
    return Pictures(unwrapped(packed.tree()), recipe, packed)


def _of_pattern(data: str, recipe: Recipe) -> Place:
    """Shards by a pattern of their names, as train-{000..146}.tar."""
    paths = [pathlib.Path(path).absolute() for path in dict.fromkeys(expanded(data))]
    for path in paths:
        if not is_shard(path):
            raise LinsightError(f"{shown(path)} has no samples as of WebDataset, 000.jpg with 000.cls or 000.json")
    folder = pathlib.Path(os.path.commonpath([path.parent for path in paths]))
    names = [path.relative_to(folder).as_posix() for path in paths]
    return Shards(data, folder, *split_files(data, names, "shards"), recipe)


def _stream(name: str, recipe: Recipe) -> Place:
    """A name of Hugging Face, or a Parquet file or a folder of these, as a stream."""
    if not os.path.exists(name):
        return Streamed(name, None, {}, "", recipe)
    place = _of_path(pathlib.Path(name), recipe)
    if not isinstance(place, Parquet):
        raise LinsightError(
            f"hfids/ reads Parquet files as a stream, and {shown(name)} has none: give the folder itself, in "
            "random access"
        )
    files = {split: [str((place.folder / name).absolute()) for name in names] for split, names in place.files.items()}
    lengths = {split or "train": count_rows(names) for split, names in files.items()}
    return Streamed(name, files, lengths, str(place.folder), recipe)


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
    tars = [name for name in tree.others if name.lower().endswith(".tar")]
    if tars and not tree.pictures and is_shard(path / tars[0]):
        return Shards(str(path), path, *split_files(str(path), tars, "shards"), recipe)
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
