"""Data for detection in COCO's form: images with boxes, classes and outlines in a file of JSON.

A folder holds `annotations/train.json` and `annotations/val.json`, or COCO's own `instances_train2017.json` there, with
images in `train2017`, `train`, `images/train`, `images` or beside; or a folder for each split with its images and
`_annotations.coco.json`. What cannot be meant is refused, with the file and the entry; objects without a usable box
are left out, and counted in a note.
"""

import collections
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import numpy as np

from linsight.errors import ImageError, LinsightError, UnknownNameError

from ._annotations import Annotations, read_annotations
from ._layout import plain, role
from .objects import Objects
from .sources import Source, first_line
from .trees import count, shown, some

# Other files of COCO's, without boxes, or of people alone.
_OTHERS = ("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_", ".")
_INSIDE = "_annotations.coco.json"


class Coco(Source):
    """The images of a split, each with its objects.

    classes: names of the categories, in the order of their ids; labels are places in it.
    category_ids, image_ids: what the file calls them, for results in COCO's form.
    targets: 0 for each image, which is of no class.
    """

    annotated = True

    def __init__(self, folder: pathlib.Path, found: Annotations, kept: list[int], notes: Iterable[str] = ()) -> None:
        self.folder, self.found, self.kept = folder, found, kept
        self.classes, self.category_ids = found.classes, found.category_ids
        self.image_ids = tuple(found.images[place].id for place in kept)
        self.targets = [0] * len(kept)
        self.notes = (*found.notes, *notes)

    def __len__(self) -> int:
        return len(self.kept)

    def stored(self, index: int) -> BinaryIO:
        """See `Source`."""
        try:
            return open(self.folder / self.found.images[self.kept[index]].name, "rb")
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {first_line(error)}") from error

    def name(self, index: int) -> str:
        """See `Source`."""
        return shown(self.found.images[self.kept[index]].name)[1:-1]

    def beside(self, index: int) -> Objects:
        """The objects of an image."""
        return self.found.objects(self.kept[index])

    def under(self, classes: tuple[str, ...]) -> "Coco":
        """These images under the classes of a model, which are found by name.

        Raises:
            LinsightError: objects of a class that the model does not know.
        """
        if classes == self.classes:
            return self
        place = {plain(name): label for label, name in enumerate(classes)}
        moved = np.array([place.get(plain(name), -1) for name in self.classes], dtype=np.int64)
        labels = moved[self.found.labels]
        if (labels < 0).any():
            others = [self.classes[label] for label in np.unique(self.found.labels[labels < 0])]
            raise LinsightError(
                f"there are objects of {some(others)}, which the model was not trained on: it knows {some(classes)}"
            )
        known = {plain(name): own for name, own in zip(self.classes, self.category_ids, strict=True)}
        ids = tuple(known.get(plain(name)) for name in classes)
        found = self.found._replace(classes=classes, category_ids=ids, labels=labels)
        return Coco(self.folder, found, self.kept, self.notes[len(found.notes) :])


class CocoFolder:
    """A folder in COCO's layout: its splits, by name, and the file of each.

    Args:
        place: the folder.
        masks: outlines of objects are read, too, and objects without one are left out.

    Raises:
        LinsightError: there is no file of objects.
    """

    exact = False
    notes: tuple[str, ...] = ()

    def __init__(self, place: pathlib.Path, masks: bool = False) -> None:
        self.place, self.masks = place, masks
        self.files = annotation_files(place)
        if not self.files:
            raise LinsightError(
                f"{shown(place)} has no file of objects in COCO's form: annotations/train.json, "
                f"annotations/instances_train2017.json or train/{_INSIDE}"
            )
        self.splits: Sequence[str] = list(self.files)

    def open(self, split: str | None) -> Coco:
        """The images of a split.

        Raises:
            LinsightError: no such split, a damaged file, none of its images is there, or, with masks, no outline.
        """
        if split is None or split not in self.files:
            raise UnknownNameError(f"split of {shown(self.place)}", split or "", self.files)
        path = self.files[split]
        found = read_annotations(path, self.masks)
        if self.masks and not len(found.boxes):
            raise LinsightError(f"{shown(path)} has no object with an outline: take a method without masks")
        folder, kept = _located(self.place, path, split, [image.name for image in found.images])
        notes = []
        if len(kept) < len(found.images):
            there = set(kept)
            gone = [image.name for place, image in enumerate(found.images) if place not in there]
            left = count(len(gone), "image", "images")
            notes.append(f"{left} of {shown(path)} left out, not in {shown(folder)}: {some(gone)}")
        names = collections.Counter(found.images[place].name for place in kept)
        if twice := [name for name, times in names.items() if times > 1]:
            files = count(len(twice), "file", "files")
            notes.append(
                f"{files} of {shown(path)} under several ids, each of which has objects of its own: {some(twice)}"
            )
        return Coco(folder, found, kept, notes)


def annotation_files(place: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of objects in a folder of COCO's layout, by split; none where it has another layout."""
    within = sorted((place / "annotations").glob("*.json"))
    found = {path.stem.removeprefix("instances_"): path for path in within if not path.name.startswith(_OTHERS)}
    return found or {path.parent.name: path for path in sorted(place.glob(f"*/{_INSIDE}"))}


def _located(place: pathlib.Path, path: pathlib.Path, split: str, names: list[str]) -> tuple[pathlib.Path, list[int]]:
    """The folder of images that has most of `names`, and the places of those that it has."""
    if path.name == _INSIDE:
        asked = [path.parent]
    else:
        purpose = role(split)
        tops = [top for top in (place, place / "images") if top.is_dir()]
        inside = [folder for top in tops for folder in sorted(top.iterdir()) if folder.is_dir()]
        alike = [folder for folder in inside if purpose and role(folder.name) == purpose]
        asked = list(dict.fromkeys([*(top / split for top in tops), *alike, *reversed(tops)]))
    best: tuple[pathlib.Path, list[int]] = (asked[0], [])
    for folder in asked:
        kept = _there(folder, names)
        if len(kept) > len(best[1]):
            best = folder, kept
    if not best[1]:
        looked = some(str(folder) for folder in asked if folder.is_dir())
        raise LinsightError(f"no image of {shown(path)} is there, as {shown(names[0])}: looked in {looked}")
    return best


def _there(folder: pathlib.Path, names: list[str]) -> list[int]:
    """The places of the names whose files are below a folder. Each folder is read once."""
    known: dict[str, set[str]] = {}
    kept = []
    for place, name in enumerate(names):
        inside, _, own = name.rpartition("/")
        if inside not in known:
            try:
                with os.scandir(folder / inside) as entries:
                    known[inside] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                known[inside] = set()
        if own in known[inside]:
            kept.append(place)
    return kept
