"""Images with what lies beside them, brought to what a model is given: both alike."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import pil_to_tensor

from linsight.errors import ImageError, LinsightError

from ._places import locate
from .datasets import Data, evaluated_split, picked_split
from .images import Batch, Samples
from .kinds import suffix_of
from .masks import MOST, NONE, Kind, MaskFolders, MaskTables, unlisted
from .panoptic import panoptic_place
from .random import hold_out
from .readers import SIDEWAYS, upright
from .sources import Part, Source
from .trees import shown, some

_PIXELS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
_TRIES = 10  # crops, of which one without too much of one class is looked for


class Marked(NamedTuple):
    """The truth about an image, which is learned.

    place: of the image in its source.
    own: height and width of the image as it is kept.  size: as the model is given it, before it is padded to others.
    mask: classes of the pixels, int16, in `size` for training and in `own` else; None where there is none.
    """

    place: int
    own: tuple[int, int]
    size: tuple[int, int]
    mask: Tensor | None = None


class MaskSamples(Samples):
    """Images of uint8 `(C, h, w)` with a `Marked`. See `Samples`.

    crop: height and width of a part of the image, which is taken at a random place and scale; None: the whole.
    recipe: with the fields of the task `segment`.
    """

    def __init__(self, source: Source, recipe: Any, crop: tuple[int, int] | None) -> None:
        super().__init__(source, pil_to_tensor, recipe.in_chans, recipe.seed, recipe.fill)
        self.recipe, self.crop = recipe, crop
        self.resample = _PIXELS[recipe.interpolation]
        jitter = recipe.color_jitter if recipe.in_chans == 3 else 0
        self.colour = ColorJitter(jitter, jitter, jitter) if jitter else None

    def prepared(self, source: Source, index: int, image: Image.Image) -> tuple[Tensor, Marked]:
        """See `Samples`.

        Raises:
            ImageError: the mask is damaged, or of another size than its image.
        """
        mask = source.beside(index)
        own = (image.height, image.width)
        if mask is not None and mask.shape != own:
            turned = source.orientation(index)
            if mask.shape == own[::-1] and turned in SIDEWAYS:
                mask = np.ascontiguousarray(upright(mask, turned))
        if mask is not None and mask.shape != own:
            raise ImageError(
                f"{source.name(index)}: is {own[1]}x{own[0]} pixels, and its mask {mask.shape[1]}x{mask.shape[0]}"
            )
        if self.crop is None:
            size = resized(own, self.recipe.eval_side)
            if size != own:
                image = image.resize(size[::-1], self.resample)
            return pil_to_tensor(image), Marked(index, own, size, None if mask is None else torch.from_numpy(mask))
        assert mask is not None, "it trains on masks"
        pixels, mask = self._cropped(image, mask, self.crop)
        return pixels, Marked(index, own, self.crop, mask)

    def _cropped(self, image: Image.Image, mask: Any, crop: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A part of the image at a random scale and place, and that of its mask; what is beyond is of no class."""
        recipe, own = self.recipe, (image.height, image.width)
        scale = float(torch.empty(()).uniform_(*recipe.resize))
        scaled = [max(round(side * scale), 1) for side in own]
        seen = [min(side, part) for side, part in zip(scaled, crop, strict=True)]
        for _ in range(_TRIES):
            start = [int(torch.randint(side - part + 1, ())) for side, part in zip(scaled, seen, strict=True)]
            rows, columns = (
                ((np.arange(part) + at + 0.5) * (side / wide)).astype(int)
                for part, at, side, wide in zip(seen, start, own, scaled, strict=True)
            )
            classes = mask[rows[:, None], columns]
            if _varied(classes, recipe.crop_share):
                break
        top, left = (at * side / wide for at, side, wide in zip(start, own, scaled, strict=True))
        bottom, right = (
            (at + part) * side / wide for at, part, side, wide in zip(start, seen, own, scaled, strict=True)
        )
        part = image.resize(seen[::-1], self.resample, box=(left, top, min(right, own[1]), min(bottom, own[0])))
        pixels = pil_to_tensor(part if self.colour is None else self.colour(part))
        found = torch.from_numpy(classes)
        if torch.rand(()) < recipe.hflip:
            pixels, found = pixels.flip(-1), found.flip(-1)
        beyond = (0, crop[1] - seen[1], 0, crop[0] - seen[0])
        if any(beyond):
            pixels, found = F.pad(pixels, beyond), F.pad(found, beyond, value=NONE)
        return pixels, found


def _varied(classes: Any, most: float) -> bool:
    """True where no class has more than a share `most` of the pixels that have one."""
    if most >= 1:
        return True
    known = classes[classes != NONE]
    return len(known) == 0 or np.bincount(known).max() <= most * len(known)


def resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side is made `shorter`; 0 leaves it."""
    if not shorter:
        return size
    height, width = (max(scaled(side, shorter, min(size)), 1) for side in size)
    return height, width


def scaled(side: Any, new: Any, old: Any) -> Any:
    """`side * new / old` to the nearest whole number, halves up: of whole numbers, so that exported graphs do alike."""
    return (2 * side * new + old) // (2 * old)


def collate(samples: list[Any]) -> Batch:
    """A batch of samples with a `Marked` each: images on one canvas, at its top and left."""
    bad = [sample for sample in samples if isinstance(sample, str)]
    good = [sample for sample in samples if not isinstance(sample, str)]
    if not good:
        return Batch(torch.empty(0, dtype=torch.uint8), [], bad)
    canvas = [max(image.shape[axis] for image, *_ in good) for axis in (1, 2)]
    images = torch.zeros(len(good), good[0][0].shape[0], *canvas, dtype=torch.uint8)
    for place, (image, *_) in enumerate(good):
        images[place, :, : image.shape[1], : image.shape[2]] = image
    notes = tuple(note for *_, notes in good for note in notes)
    return Batch(images, [target for _, target, _ in good], bad, notes)


def open_masks(recipe: Any) -> Data:
    """The two sources of a recipe whose images have masks, with the same classes.

    Classes are those of a list beside the folders, or numbers 0 to `num_classes`, or the values that are in masks.

    Raises:
        LinsightError: nothing there, images without masks, or fewer than two classes.
    """
    place, data = _place(recipe), shown(recipe.data)
    train_split = picked_split(place, recipe.train_split, recipe)
    val_split = picked_split(place, recipe.val_split, recipe) if recipe.val_split else evaluated_split(place, recipe)
    notes = list(place.notes)
    whole = place.open(train_split)
    if not whole.classes:
        found = _values(whole, recipe)
        notes.append(f"{data} has no list of classes (classes.txt): its masks have the values {_in_words(found)}")
        place.listed = [Kind(str(value)) for value in found]
        whole = place.open(train_split)
    if len(whole.classes) < 2:
        raise LinsightError(
            f"{data} has one class only ({some(whole.classes)}): there is nothing to learn; what is ignored is no "
            f"class (ignore={recipe.ignore}; none: every value is one)"
        )
    train: Source = whole
    val: Source = whole
    if val_split is None:
        kept, held = hold_out(whole.targets, recipe.val_fraction)
        train, val = Part(whole, kept), Part(whole, held)
        notes.append(f"{data} has no split to evaluate on: {len(val)} of its {len(whole)} images are held out")
    else:
        val = place.open(val_split)
        if val.classes != whole.classes:
            raise LinsightError(f"{data} has other classes in {val_split} than in {train_split}: list the same in both")
    for source, what in ((train, "to train on"), (val, "to evaluate on")):
        if not len(source):
            raise LinsightError(f"{data} has no image {what}")
    notes += [line for line in (unlisted(whole),) if line]
    return Data(train, val, whole.classes, tuple(notes))


def open_evaluated_masks(recipe: Any, split: str | None, classes: tuple[str, ...]) -> Source:
    """The images to evaluate a model of `classes` on: a split, or all of a folder that has none."""
    place = _place(recipe)
    wanted = split or recipe.val_split
    chosen = picked_split(place, wanted, recipe) if wanted else evaluated_split(place, recipe)
    place.listed = place.listed or [Kind(name) for name in classes]
    found = place.open(chosen)
    if found.classes != classes:  # as the files say themselves, by a list or by categories
        raise LinsightError(
            f"{shown(recipe.data)} has other classes than the model was trained on: it knows {some(classes)}"
        )
    return found


def _place(recipe: Any) -> MaskFolders:
    """The place of a recipe's images with masks: folders, Parquet files, or a data set of Hugging Face."""
    folder = pathlib.Path(os.path.expanduser(recipe.data))
    tables = folder.suffix.lower() == ".parquet" or next(folder.glob("**/*.parquet"), None) is not None
    if not recipe.data.startswith("hfds/") and not tables:
        return panoptic_place(recipe, folder) or MaskFolders(recipe, recipe.ignore)
    place = locate(recipe)
    if not hasattr(place, "table"):
        raise LinsightError(f"{shown(recipe.data)} has no masks: give folders of images and masks, or rows with both")
    return MaskTables(recipe, recipe.ignore, place)


def _values(source: Any, recipe: Any) -> list[int]:
    """The values in all masks of a source, without the one that is ignored."""
    found: set[int] = set()
    bad: list[ImageError] = []
    for index in range(len(source)):
        if suffix_of(source.called(index)) in _LOSSY:
            raise LinsightError(
                f"the mask {shown(source.called(index))} is a JPEG file, which changes values, so they do not tell the "
                "classes: save masks as PNG, or list the classes in classes.txt"
            )
        try:
            mask = source.mask(index)
        except ImageError as error:
            bad.append(error)
            continue  # which is told when the image is read
        if mask.ndim == 3:
            source.kinds.read(mask, source.called(index))  # raises the error that says what to do
        found.update(np.unique(mask).tolist())
        if len(found) > MOST or min(found) < 0:
            raise LinsightError(
                f"the masks of {shown(recipe.data)} have {len(found)} values, from {min(found)} to {max(found)}, and "
                f"classes are 0 to {MOST} at most: are they masks of classes?"
            )
    if bad and not found:
        raise LinsightError(f"no mask of {shown(recipe.data)} can be read: {bad[0]}")
    found.discard(recipe.ignore)
    return sorted(found)


def _in_words(values: Sequence[int]) -> str:
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values[:8])) + (", ..." if values[8:] else "")
