"""Masks in COCO's panoptic form: a picture whose colours number segments, and a file that tells the class of each.

A folder holds `annotations/panoptic_train2017.json` with its pictures in `annotations/panoptic_train2017` (or beside),
and images in `train2017` or `images/train2017`. Pixels of no segment are of no class, and so is what is a crowd.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from linsight.errors import ImageError, LinsightError, UnknownNameError
from linsight.recipe import Recipe

from ._annotations import is_crowd, key_of
from ._layout import plain
from .masks import NONE, Classes, Kind, MaskFolders, Masks
from .pictures import calmly
from .sources import Files
from .trees import count, shown, some

_START = "panoptic_"


class PanopticFolder(MaskFolders):
    """A folder in COCO's panoptic layout.

    Raises:
        LinsightError: a file is damaged, or what it names is not there.
    """

    def __init__(self, recipe: Recipe, folder: pathlib.Path, files: Mapping[str, pathlib.Path]) -> None:
        self.folder, self.files, self.notes = folder, files, ()
        self.splits, self.listed, self.many, self.ignored = list(files), [], None, None

    def open(self, split: str | None) -> "Panoptic":
        """See `MaskFolders`."""
        if split is None or split not in self.files:
            raise UnknownNameError(f"split of {shown(self.folder)}", split or "", self.files)
        path = self.files[split]
        images, rows, names = _read(path)
        pictures = _folder(path, [path.with_suffix(""), self.folder / path.stem], [row["file_name"] for row in rows])
        tops = [top / split for top in (self.folder, self.folder / "images")]
        there = _folder(path, tops, images)
        kinds = [Kind(name) for name in names.values()]
        return Panoptic(Files(there, images), Files(pictures, [row["file_name"] for row in rows]), rows, names, kinds)


class Panoptic(Masks):
    """Images with segments. rows: of the file, an image each.  names: of categories by their ids."""

    def __init__(
        self, images: Files, pictures: Files, rows: Sequence[Any], names: Mapping[int, str], kinds: list[Kind]
    ) -> None:
        super().__init__(images, pictures, len(rows), Classes(kinds, None))
        place: dict[int | str | None, int] = {key: index for index, key in enumerate(names)}
        self.segments = [
            {
                int(segment["id"]): NONE if is_crowd(segment.get("iscrowd")) else place[key_of(segment["category_id"])]
                for segment in row["segments_info"]
            }
            for row in rows
        ]

    def beside(self, index: int) -> Any:
        """The classes of pixels `(h, w)`, int16."""
        name = self.called(index)
        try:
            file = self.masks.open(index)
        except OSError as error:
            raise ImageError(f"{name}: {error.strerror or error}") from error
        with file, calmly(name), Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(np.int64)
        codes = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        found, inverse = np.unique(codes, return_inverse=True)
        known = self.segments[index]
        return np.array([known.get(int(code), NONE) for code in found], np.int16)[inverse].reshape(codes.shape)


def panoptic_place(recipe: Recipe, folder: pathlib.Path) -> PanopticFolder | None:
    """The place of a folder in COCO's panoptic layout; None where it has another one."""
    files = {path.stem.removeprefix(_START): path for path in sorted((folder / "annotations").glob(f"{_START}*.json"))}
    return PanopticFolder(recipe, folder, files) if files else None


def _read(path: pathlib.Path) -> tuple[list[str], list[Any], dict[int, str]]:
    """The file names of images, the rows of their segments, and the names of categories by id, in order."""
    try:
        found = json.loads(path.read_bytes())
        names = {int(row["id"]): plain(str(row["name"])) for row in found["categories"]}
        files = {key_of(row["id"]): str(row["file_name"]) for row in found["images"]}
        rows = list(found["annotations"])
        images = [files[key_of(row["image_id"])] for row in rows]
        segments = [segment for row in rows for segment in row["segments_info"]]
        odd = [segment for segment in segments if key_of(segment["category_id"]) not in names]
        named = [(str(row["file_name"]), [int(segment["id"]) for segment in row["segments_info"]]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise LinsightError(f"{shown(path)} is no file of segments in COCO's panoptic form: {said:.120}") from error
    if odd:
        category = odd[0]["category_id"]
        raise LinsightError(f"{shown(path)} has a segment of the category {category}, which it does not list")
    if not named:
        raise LinsightError(f"{shown(path)} has no image with segments")
    names = dict(sorted(names.items()))
    if len(set(names.values())) < len(names):
        raise LinsightError(f"{shown(path)} has two categories of one name: give them names of their own")
    for name in [*images, *(name for name, _ in named)]:
        if pathlib.PurePosixPath(name).is_absolute() or ".." in pathlib.PurePosixPath(name).parts:
            raise LinsightError(f"{shown(path)} names a file outside of its folders: {shown(name)}")
    return images, rows, names


def _folder(path: pathlib.Path, asked: Sequence[pathlib.Path], names: Sequence[str]) -> pathlib.Path:
    """The folder that has all the files that are named."""
    for folder in asked:
        gone = [name for name in names if not (folder / name).is_file()]
        if not gone:
            return folder
        if len(gone) < len(names):
            raise LinsightError(
                f"{shown(folder)} lacks {count(len(gone), 'file', 'files')} of {shown(path)}: {some(gone)}"
            )
    looked = some(str(folder) for folder in asked)
    raise LinsightError(f"no file that {shown(path)} names is there, as {shown(names[0])}: looked in {looked}")
