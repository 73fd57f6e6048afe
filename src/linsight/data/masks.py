"""Masks: which pixel of an image is of which class, as files beside the images.

A mask is a picture of whole numbers, or of colours that a list of classes tells. Read, it is `(h, w)` of int16: places
in that list, and `NONE` for pixels of no class.
"""

import csv
import io
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from linsight.errors import ImageError, LinsightError
from linsight.recipe import Recipe

from ._layout import role
from ._parquet import mask_rows
from .pictures import calmly
from .sources import Files, Reading, Source
from .trees import Tree, count, shown, some, walk

NONE = -1  # the class of a pixel that is of none
MOST = 4096  # classes
_VALUES = 2**16  # of pixels, from 0
_LOOKED_AT = 8  # masks, for colours that are not listed
# Folders of images and of masks, and what stands behind the names of files in them.
_IMAGES = frozenset(("images", "image", "imgs", "img", "jpegimages", "rgb", "leftimg8bit"))
_MASKS = frozenset(
    (
        *("masks", "mask", "annotations", "annotation", "labels", "label", "gt", "gtfine", "segmentation"),
        *("segmentations", "segmentationclass", "labelids"),
    )
)
_BEHIND_IMAGE = ("_leftimg8bit", "_image", "_img", "_sat", "_rgb")
_BEHIND_MASK = (  # the first is taken, where an image has several masks
    *("_gtfine_labeltrainids", "_gtfine_labelids", "_labeltrainids", "_labelids", "_mask", "_masks", "_label"),
    *("_labels", "_segmentation", "_seg", "_gt", "_l"),
)
# trainannot, val_masks, stuff_val2017_pixelmaps
_BEHIND_FOLDER = re.compile(r"(?:stuff_)?(.+?)[_-]?(?:annot|annotations?|masks?|labels?|pixelmaps)")
_LISTS = ("classes.txt", "classes.csv", "class_dict.csv", "labels.txt", "label_colors.txt", "codes.txt")


class Kind(NamedTuple):
    """A class of a list: its name, and the colour that it has in masks, where one is told."""

    name: str
    colour: tuple[int, int, int] | None = None


class Classes:
    """The classes of masks, and which values of pixels are of which; a LinsightError where one of them is ignored.

    A value is the place of its class in the list; where names are numbers, each is the value of its class. `ignored`
    is the value of pixels of no class; with 0 ignored, the first class is 1.

    kinds: the list.  ignored: None: every pixel is of a class.
    """

    def __init__(self, kinds: Sequence[Kind], ignored: int | None) -> None:
        self.names = tuple(kind.name for kind in kinds)
        self.ignored = ignored
        values = values_of(self.names, ignored)
        self.place = np.full(_VALUES, -2, np.int16)
        self.place[values] = range(len(values))
        if ignored in values:
            raise LinsightError(
                f"the value {ignored} in masks is that of the class {shown(self.names[values.index(ignored)])}, and is "
                "ignored: pass another one, as in ignore=65535, or ignore=none"
            )
        if ignored is not None:
            self.place[ignored] = NONE
        self.colours: Any = None
        self.greys: Any = None  # places by level, where all colours are grey
        if kinds and all(kind.colour is not None for kind in kinds):
            colours = [kind.colour for kind in kinds if kind.colour is not None]
            codes = [_code(*colour) for colour in colours]
            order = np.argsort(codes)
            self.colours = np.array(codes)[order], order.astype(np.int16)
            if all(len(set(colour)) == 1 for colour in colours):
                self.greys = np.full(_VALUES, -2, np.int16)
                self.greys[[red for red, *_ in colours]] = range(len(colours))

    def read(self, mask: Any, name: str) -> Any:
        """Places of classes `(h, w)`, of a mask as `decode_mask` gives it.

        Raises:
            ImageError: a value or a colour of no class.
        """
        if mask.ndim == 3:
            return self._of_colours(mask, name)
        if mask.min() < 0 or mask.max() >= _VALUES:
            raise ImageError(f"{name}: its values are {mask.min()} to {mask.max()}, and masks have 0 to 65535")
        if self.greys is not None and (found := self.greys[mask]).min() >= 0:
            return found
        found = self.place[mask]
        if (found == -2).any():
            odd = int(mask[found == -2].max())
            values = values_of(self.names, self.ignored)
            raise ImageError(
                f"{name}: has the value {odd}, and its classes are {min(values)} to {max(values)}: if {odd} is no "
                f"class, pass ignore={odd}"
            )
        return found

    def _of_colours(self, mask: Any, name: str) -> Any:
        if self.colours is None:
            raise ImageError(
                f"{name}: is a mask of colours: tell them in classes.txt beside the folders, a line for each class: "
                "red green blue name"
            )
        codes, order = self.colours
        wide = mask.astype(np.int64)
        given = _code(wide[..., 0], wide[..., 1], wide[..., 2])
        place = np.searchsorted(codes, given).clip(max=len(codes) - 1)
        listed = codes[place] == given
        if not listed.any():
            raise ImageError(f"{name}: none of its colours is in the list of classes, as {_words(wide[0, 0])}")
        return np.where(listed, order[place], np.int16(NONE))


def unlisted(source: Any) -> str:
    """A line on colours of no class in the first masks of a source, "" where there are none, or no colours."""
    pixels, others, first = 0, 0, ""
    for index in range(min(len(source), _LOOKED_AT)):
        try:
            mask = source.mask(index)
            if mask.ndim < 3 or source.kinds.colours is None:
                return ""
            none = source.kinds.read(mask, source.called(index)) == NONE
        except ImageError:
            continue  # which is told when the image is read
        if none.any() and not first:
            first = f"{_words(mask[none][0])} in {shown(source.called(index))}"
        pixels, others = pixels + none.size, others + int(none.sum())
    share = f"{100 * others / max(pixels, 1):.3g} %"
    return f"colours of no class, as {first}, have {share} of the pixels looked at: they are ignored" if first else ""


def _words(colour: Any) -> str:
    return " ".join(map(str, colour.tolist()))


def _code(red: Any, green: Any, blue: Any) -> Any:
    return (red * 256 + green) * 256 + blue


def values_of(names: Sequence[str], ignored: int | None) -> list[int]:
    """The value of each class in masks."""
    if names and all(name.isdecimal() for name in names):
        return [int(name) for name in names]
    first = 1 if ignored == 0 else 0
    return list(range(first, first + len(names)))


def decode_mask(stored: Any, name: str, kinds: Classes | None = None) -> Any:
    """A mask as it is kept: `(h, w)` of whole numbers, or `(h, w, 3)` of colours. Palettes are values.

    stored: a path, or an open file.  name: of the mask, in messages.
    kinds: what it is read by. Where a list has colours, black in a picture of colours is one of them, and no value 0.

    Raises:
        ImageError: it is damaged, no picture, or of no whole numbers.
    """
    with calmly(name), Image.open(stored) as image:
        image.load()
        if image.mode in ("F", "CMYK", "YCbCr", "LAB", "HSV"):
            raise ImageError(f"{name}: a mask of mode {image.mode} tells no classes: save it as PNG, a value a class")
        pixels = np.asarray(image.convert("RGB") if image.mode in ("PA", "RGBa", "RGBX") else image)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1]
        coloured = kinds is not None and kinds.colours is not None and pixels.shape[2] == 3
        if not coloured and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., 0]
    white = 1 if kinds is None or kinds.greys is None else 255
    return pixels.astype(np.uint8) * np.uint8(white) if pixels.dtype == bool else pixels


class Masks(Reading):
    """Images with a mask each.

    reader, masks: of the `count` files of the ones and the others, by place.  kinds: the classes.
    """

    annotated = True

    def __init__(self, reader: Any, masks: Any, count: int, classes: Classes, notes: tuple[str, ...] = ()) -> None:
        super().__init__(reader, [0] * count, classes.names, notes)
        self.masks, self.kinds = masks, classes

    def beside(self, index: int) -> Any:
        """The mask, `(h, w)` of int16."""
        return self.kinds.read(self.mask(index), self.called(index))

    def mask(self, index: int) -> Any:
        """The mask as it is kept, see `decode_mask`."""
        name = self.called(index)
        try:
            with self.masks.open(index) as file:
                return decode_mask(file, name, self.kinds)
        except OSError as error:
            raise ImageError(f"{name}: {error.strerror or error}") from error

    def called(self, index: int) -> str:
        """The name of a mask in a message."""
        return shown(self.masks.filename(index))[1:-1]


class MaskFolders:
    """A folder with images and masks: images/ and masks/, with splits in them, above them, or none.

    Raises:
        LinsightError: no images, no masks, or images without a mask.
    """

    exact = False
    splits: Sequence[str]
    notes: tuple[str, ...]

    def __init__(self, recipe: Recipe, ignored: int | None) -> None:
        path = pathlib.Path(os.path.expanduser(recipe.data))
        if not path.is_dir():
            raise LinsightError(f"no such data folder: {shown(recipe.data)}: give one with images/ and masks/ in it")
        self.folder, self.ignored = path, ignored
        tree = walk(path)
        self.pairs, notes = _paired(tree)
        self.splits = sorted(filter(None, self.pairs))
        self.notes = (*tree.notes, *notes)
        self.listed = class_list(path)
        self.many = recipe.num_classes

    def open(self, split: str | None) -> Source:
        """The images of a split, or all where there are none; its classes are () where only its masks tell them."""
        if (split or "") not in self.pairs:
            raise LinsightError(
                f"{shown(self.folder)} has the splits {some(self.splits)}, and none of these is asked for: name one "
                "with val_split= (--split)"
            )
        pairs = self.pairs[split or ""]
        images, masks = (Files(self.folder, [pair[side] for pair in pairs]) for side in (0, 1))
        return Masks(images, masks, len(pairs), Classes(self.kinds(), self.ignored))

    def kinds(self) -> list[Kind]:
        """The classes, as far as they are told."""
        return self.listed or [Kind(f"class {place}") for place in range(self.many or 0)]


class MaskTables(MaskFolders):
    """Rows with an image and a mask each: of Parquet files, or of Hugging Face.

    place: that of a recipe whose rows have classes.
    """

    def __init__(self, recipe: Recipe, ignored: int | None, place: Any) -> None:
        self.place, self.recipe, self.ignored = place, recipe, ignored
        self.exact, self.splits, self.notes = place.exact, place.splits, place.notes
        folder = getattr(place, "folder", None)
        self.listed, self.many = class_list(folder) if folder else [], recipe.num_classes

    def open(self, split: str | None) -> Source:
        """See `MaskFolders`."""
        recipe, (table, folder) = self.recipe, self.place.table(split)
        images, masks = mask_rows(self.place.label, table, folder, recipe.image_key, recipe.label_key)
        return Masks(images, masks, len(table), Classes(self.kinds(), self.ignored))


def _paired(tree: Tree) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Images and their masks by split, "" where there are none; and notes."""
    images: dict[str, str] = {}
    masks: dict[str, dict[int, str]] = {}
    for name in tree.pictures:
        *folders, file = name.split("/")
        stem = file.rpartition(".")[0]
        kind, rest = _side(folders)
        if kind == "mask":
            own, rank = _stripped(stem, _BEHIND_MASK)
            masks.setdefault("/".join([*rest, own]), {}).setdefault(rank, name)
        else:
            own, _ = _stripped(stem, _BEHIND_IMAGE)
            images.setdefault("/".join([*rest, own]), name)
    where = shown(tree.label)
    if not masks:
        raise LinsightError(
            f"{where} has no masks: put images into images/ and their masks, of the same names, into masks/"
        )
    if not images:
        raise LinsightError(f"{where} has masks and no images: put images into images/")
    lone = [name for key, name in images.items() if key not in masks]
    if len(lone) == len(images):
        raise LinsightError(
            f"no image of {where} has a mask: {shown(lone[0])} needs one of its name, as in "
            f"{shown(next(iter(next(iter(masks.values())).values())))}"
        )
    notes = [f"{count(len(lone), 'image', 'images')} without a mask left out: {some(lone)}"] if lone else []
    found: dict[str, list[tuple[str, str]]] = {}
    for key, name in images.items():
        if key in masks:
            top = key.partition("/")[0] if "/" in key else ""
            found.setdefault(top if role(top) else "", []).append((name, min(masks[key].items())[1]))
    if "" in found and len(found) > 1:
        raise LinsightError(
            f"{where} has the splits {some(sorted(filter(None, found)))} and images beside them, as "
            f"{shown(found[''][0][0])}: move those into a split"
        )
    return found, notes


def _side(folders: list[str]) -> tuple[str, list[str]]:
    """A file in these folders is an "image" or a "mask"; and the folders without the one that says so."""
    for place, folder in enumerate(folders):
        name = folder.casefold()
        if name in _IMAGES or name in _MASKS:
            return "image" if name in _IMAGES else "mask", folders[:place] + folders[place + 1 :]
    for place, folder in enumerate(folders):
        behind = _BEHIND_FOLDER.fullmatch(folder.casefold())
        if behind:
            return "mask", [*folders[:place], folder[behind.start(1) : behind.end(1)], *folders[place + 1 :]]
    return "image", folders


def _stripped(stem: str, endings: Sequence[str]) -> tuple[str, int]:
    """A name without the first of these endings that it has, and which that is; a bare name comes first."""
    for rank, ending in enumerate(endings):
        if stem.casefold().endswith(ending) and len(stem) > len(ending):
            return stem[: -len(ending)], rank
    return stem, -1


def class_list(folder: pathlib.Path) -> list[Kind]:
    """The classes that a file in a folder lists: a name a line, with its colour before or behind it; [] without one.

    Raises:
        LinsightError: it cannot be read, or lists one class twice.
    """
    path = next((folder / name for name in _LISTS if (folder / name).is_file()), None)
    if path is None:
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LinsightError(f"{shown(path)} is no list of classes: {error}") from error
    table = path.suffix == ".csv"
    kinds = _of_table(text, path) if table else [_kind(line) for line in text.splitlines() if line.strip()]
    names = [kind.name for kind in kinds]
    if twice := [name for name in names if not name or names.count(name) > 1]:
        raise LinsightError(f"{shown(path)} lists the class {shown(twice[0])} twice, or without a name")
    if not 0 < len(names) <= MOST:
        raise LinsightError(f"{shown(path)} lists {len(names)} classes: 1 to {MOST} are read")
    if max(values_of(names, None)) >= _VALUES:
        raise LinsightError(f"{shown(path)}: names that are numbers are values of pixels, 0 to {_VALUES - 1}")
    colours = [kind.colour for kind in kinds if kind.colour is not None]
    if len(set(values_of(names, None))) < len(names) or len(set(colours)) < len(colours):
        raise LinsightError(f"{shown(path)} has one value or colour for two classes: give each its own")
    if colours and len(colours) < len(names):
        bare = [kind.name for kind in kinds if kind.colour is None]
        raise LinsightError(f"{shown(path)} has colours, 0 to 255, of some classes and not of {some(bare)}")
    return kinds


def _kind(line: str) -> Kind:
    """A class of a line: `name`, `red green blue name` or `name red green blue`."""
    parts = line.replace(",", " ").replace("\t", " ").split()
    for numbers, name in ((parts[:3], parts[3:]), (parts[-3:], parts[:-3])):
        if name and all(part.isdecimal() and int(part) < 256 for part in numbers):
            red, green, blue = map(int, numbers)
            return Kind(" ".join(name), (red, green, blue))
    return Kind(line.strip())


def _of_table(text: str, path: pathlib.Path) -> list[Kind]:
    """Classes of a table with the columns name and, perhaps, r, g, b."""
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)  # of spreadsheets
    rows: Iterable[Mapping[str, str]] = csv.DictReader(io.StringIO(text), skipinitialspace=True, delimiter=separator)
    found = []
    for row in rows:
        low = {str(key).strip().casefold(): str(value).strip() for key, value in row.items()}
        if "name" not in low:
            raise LinsightError(f"{shown(path)} has no column 'name': its first line is to be 'name,r,g,b', or 'name'")
        colour = [low.get(key, "") for key in ("r", "g", "b")]
        known = all(part.isdecimal() and int(part) < 256 for part in colour)
        found.append(Kind(low.get("name", ""), (int(colour[0]), int(colour[1]), int(colour[2])) if known else None))
    return found
