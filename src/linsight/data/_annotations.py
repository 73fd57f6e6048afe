"""Reads a file of objects in COCO's form, which may be anybody's: every entry is looked at before it is used."""

import collections
import itertools
import json
import math
import pathlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from linsight.errors import LinsightError
from linsight.runtime.files import read_json, to_json

from .objects import Objects, whole_outline
from .trees import count, shown, some

_MOST = 2**33  # bytes of a file; COCO's own has 450 million
_CLOSE = 1.0  # pixels beyond the border that rounding explains
# Reasons for which an object is left out, and notes on those that stay.
_STRANGE = "of an image that is not in the file: left out"
_FORMLESS = "without a box of four finite numbers: left out"
_EMPTY = "whose box has no width or no height: left out"
_OUTSIDE = "whose box lies outside of its image: left out"
_BARE = "without an outline that can be used: left out"
_CUT = "whose box reaches beyond its image: cut at the border"
_AGAIN = "with an id that another one has, too: kept"


class Entry(NamedTuple):
    """An image: its id, its name below the folder of images, its height and width."""

    id: Hashable
    name: str
    size: tuple[int, int]


class Annotations(NamedTuple):
    """The objects of a file, in arrays that processes share, those of one image after those of another.

    classes, category_ids: names and ids of the categories, in the order of the ids.
    starts: `(images + 1,)`, the first object of each image and of none.
    outlines: as JSON, in one block.  cuts: `(objects + 1,)`, where each begins in it; empty without outlines.
    notes: what was left out.
    """

    classes: tuple[str, ...]
    category_ids: tuple[Any, ...]
    images: list[Entry]
    starts: Any
    boxes: Any
    labels: Any
    crowds: Any
    areas: Any
    outlines: bytes
    cuts: Any
    notes: tuple[str, ...]

    def objects(self, place: int) -> Objects:
        """The objects of the image at a place."""
        first, end = int(self.starts[place]), int(self.starts[place + 1])
        cuts = self.cuts[first : end + 1].tolist() if len(self.cuts) else []
        arrays = (self.boxes, self.labels, self.crowds, self.areas)
        boxes, labels, crowds, areas = (torch.from_numpy(array[first:end].copy()) for array in arrays)
        outlines = tuple(json.loads(self.outlines[a:b]) for a, b in itertools.pairwise(cuts))
        return Objects(boxes, labels, crowds, areas, self.images[place].size, outlines)


def read_annotations(path: pathlib.Path, masks: bool = False) -> Annotations:
    """The objects of a file.

    masks: with their outlines; objects without one are left out.

    Raises:
        LinsightError: the file is damaged or no such file, an image without name or size, two of one id, a category
            that is not in it, or two of one name or id.
    """
    found = read_json(path, _MOST)
    images = _images(path, found)
    classes, category_ids = _categories(path, found)
    number = {category: label for label, category in enumerate(category_ids)}
    place = {image.id: index for index, image in enumerate(images)}
    kept = list[tuple[int, int, bool, float]]()
    boxes, outlines = list[tuple[float, ...]](), list[bytes]()
    told, first = collections.Counter[str](), dict[str, str]()
    ids = set[Hashable]()
    for order, row in enumerate(_rows(path, found, "annotations")):
        own, category = row.get("id", f"number {order + 1}"), key_of(row.get("category_id"))
        if category not in number:
            known, said = some(map(str, category_ids)), shown(row.get("category_id"))
            raise LinsightError(
                f"{shown(path)}: the annotation {shown(own)} is of the category {said}, which is not in the "
                f"file (it has {known}): add it to 'categories'"
            )
        image = place.get(key_of(row.get("image_id")))
        size = (0, 0) if image is None else images[image].size
        box, kind = _box(row.get("bbox"), size) if image is not None else (None, _STRANGE)
        outline = row.get("segmentation")
        if masks and box is not None and not whole_outline(outline, size):
            box, kind = None, _BARE
        again = _AGAIN if isinstance(own, Hashable) and own in ids and box is not None else ""
        ids.add(own if isinstance(own, Hashable) else order)
        for line in filter(None, (kind, again)):
            told[line] += 1
            first.setdefault(line, shown(own))
        if image is None or box is None:
            continue
        boxes.append(box)
        kept.append((image, number[category], is_crowd(row.get("iscrowd")), _area(row.get("area"), box)))
        if masks:
            outlines.append(to_json(outline).encode())
    notes = [
        f"{shown(path)} has {count(number_of, 'object', 'objects')} {line} (the first is {first[line]})"
        for line, number_of in told.items()
    ]
    return _arranged(classes, category_ids, images, kept, boxes, outlines, notes)


def _arranged(
    classes: tuple[str, ...],
    category_ids: tuple[Any, ...],
    images: list[Entry],
    kept: list[tuple[int, int, bool, float]],
    boxes: list[tuple[float, ...]],
    outlines: list[bytes],
    notes: list[str],
) -> Annotations:
    """The rows of all objects, in the order of their images."""
    owners = np.array([own for own, *_ in kept], dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    starts = np.searchsorted(owners[order], np.arange(len(images) + 1))
    outlines = [outlines[place] for place in order.tolist()] if outlines else []
    cuts = np.cumsum([0, *map(len, outlines)]) if outlines else np.empty(0, dtype=np.int64)
    return Annotations(
        classes,
        category_ids,
        images,
        starts,
        np.array(boxes, dtype=np.float32).reshape(-1, 4)[order],
        np.array([label for _, label, *_ in kept], dtype=np.int64)[order],
        np.array([crowd for *_, crowd, _ in kept], dtype=bool)[order],
        np.array([area for *_, area in kept], dtype=np.float32)[order],
        b"".join(outlines),
        cuts,
        tuple(notes),
    )


def _rows(path: pathlib.Path, found: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    rows = found.get(name)
    if not isinstance(rows, list):
        raise LinsightError(
            f"{shown(path)} has no list '{name}', and COCO's form has images, annotations and categories"
        )
    for order, row in enumerate(rows):
        if not isinstance(row, dict):
            raise LinsightError(
                f"{shown(path)}: number {order + 1} of '{name}' is no object, but a {type(row).__name__}"
            )
        yield row


def _images(path: pathlib.Path, found: Mapping[str, Any]) -> list[Entry]:
    images = list[Entry]()
    ids = set[Hashable]()
    for order, row in enumerate(_rows(path, found, "images")):
        own, name = key_of(row.get("id")), row.get("file_name")
        height, width = key_of(row.get("height")), key_of(row.get("width"))
        where = f"{shown(path)}: the image number {order + 1}"
        if own is None:
            raise LinsightError(f"{where} has no id: a whole number, or a text")
        if own in ids:
            raise LinsightError(f"{where} has the id {shown(own)}, as one before it: ids of images are for one each")
        ids.add(own)
        if not isinstance(name, str) or not name.strip("/. ") or "\0" in name:
            raise LinsightError(f"{where} has no file_name")
        name = name.replace("\\", "/")  # as Windows has them
        if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
            raise LinsightError(f"{where} has the file_name {shown(name)}: it must be below the folder of images")
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            raise LinsightError(f"{where} ({shown(name)}) has no height and width: boxes are in pixels of that size")
        images.append(Entry(own, name, (height, width)))
    if not images:
        raise LinsightError(f"{shown(path)} has no image")
    return images


def _categories(path: pathlib.Path, found: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names and ids, in the order of the ids."""
    rows = [{**row, "id": key_of(row.get("id"))} for row in _rows(path, found, "categories")]
    for row in rows:
        if not isinstance(row["id"], int) or not isinstance(row.get("name"), str):
            said = shown(row.get("name"))
            raise LinsightError(f"{shown(path)}: the category {said} lacks a name, or a whole number as its id")
    rows.sort(key=lambda row: row["id"])
    ids, names = tuple(row["id"] for row in rows), tuple(row["name"] for row in rows)
    for what, entries in (("id", ids), ("name", names)):
        twice = [entry for entry, times in collections.Counter[Any](entries).items() if times > 1]
        if twice:
            raise LinsightError(f"{shown(path)} has two categories of the {what} {shown(twice[0])}: leave one out")
    if not rows:
        raise LinsightError(f"{shown(path)} has no category: an object is of one")
    return names, ids


def key_of(value: Any) -> int | str | None:
    """An id or a size as it is meant: 7 for 7, 7.0 and "7", which programs write for one another; None for none."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and str(number := int(value[:18])) == value:
        return number
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def is_crowd(value: Any) -> bool:
    """True for 1, and for what stands for it; not for "0", which is a text and so no empty one, nor for NaN."""
    if isinstance(value, str):
        return value.strip().casefold() in ("1", "1.0", "true", "yes")
    return isinstance(value, int | float) and bool(value) and math.isfinite(value)


def _box(box: Any, size: tuple[int, int]) -> tuple[tuple[float, ...] | None, str]:
    """x1, y1, x2, y2 of x, y, width, height, within the image, None where there is no such box; and what to tell."""
    if not isinstance(box, list):
        return None, _FORMLESS
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError, OverflowError):
        return None, _FORMLESS
    if not math.isfinite(x + y + width + height):
        return None, _FORMLESS
    if width <= 0 or height <= 0:
        return None, _EMPTY
    bottom, right = size
    found = (max(x, 0.0), max(y, 0.0), min(x + width, float(right)), min(y + height, float(bottom)))
    if found[2] <= found[0] or found[3] <= found[1]:
        return None, _OUTSIDE
    if np.float32(found[2]) <= np.float32(found[0]) or np.float32(found[3]) <= np.float32(found[1]):
        return None, _EMPTY  # as it is kept
    far = max(-x, -y, x + width - right, y + height - bottom)
    return found, _CUT if far > _CLOSE else ""


def _area(area: Any, box: tuple[float, ...]) -> float:
    """The area that a file tells, or that of the box."""
    try:
        told = float(area)
    except (TypeError, ValueError, OverflowError):
        told = math.nan
    return told if 0 < told < 1e30 else (box[2] - box[0]) * (box[3] - box[1])
