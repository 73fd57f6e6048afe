"""Images with their objects, brought to what a detector is given: both alike."""

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from linsight.errors import ImageError, LinsightError
from linsight.runtime.places import located

from .coco import CocoFolder
from .datasets import Data, evaluated_split, picked_split
from .dense import scaled
from .images import Samples
from .objects import Objects
from .random import hold_out
from .readers import SIDEWAYS
from .sources import Part, Source
from .trees import shown

# Of the largest shorter side: images are made so small, and then cut into parts so large, before they are made larger
# again. With 800 these are the 400, 500 or 600 and the 384 to 600 pixels of published recipes.
_FIRST, _PARTS = (0.5, 0.625, 0.75), (0.48, 0.75)


class Scene(NamedTuple):
    """The truth about an image, which is learned or found.

    place: of the image in its source.
    own: height and width of the image as it is kept.  size: as the model is given it, before it is padded to others.
    objects: in the pixels of `size` and without crowds for training, in those of `own` else; None where none are told.
    masks: uint8 `(N, *size)`, of the objects for training, where they are learned.
    """

    place: int
    own: tuple[int, int]
    size: tuple[int, int]
    objects: Objects | None = None
    masks: Tensor | None = None


class ObjectSamples(Samples):
    """Images of uint8 `(C, h, w)` with a `Scene`. See `Samples`.

    recipe: with the fields of the task `detect`.  training: augmented, with what is learned of them.
    """

    def __init__(self, source: Source, recipe: Any, training: bool) -> None:
        super().__init__(source, pil_to_tensor, recipe.in_chans, recipe.seed, recipe.fill)
        self.recipe, self.training, self.masks = recipe, training, "mask" in recipe.method
        self.augment = augmentation(recipe) if training else None

    def prepared(self, source: Source, index: int, image: Image.Image) -> tuple[Tensor, Scene]:
        """See `Samples`.

        Raises:
            ImageError: it is of another size than its objects were told for, a mask is damaged, or it is too narrow.
        """
        own, found, name = (image.height, image.width), source.beside(index), source.name(index)
        if found is not None and found.size != own:
            turned = source.orientation(index)
            if found.size != own[::-1] or turned not in SIDEWAYS:
                told = f"{found.size[1]}x{found.size[0]}"
                raise ImageError(f"{name}: is {own[1]}x{own[0]} pixels, upright, and its boxes are for {told}")
            found = found.upright(turned)
        if self.augment is None:
            size = within(own, self.recipe.eval_side, self.recipe.longest)
            if size != own:
                image = v2.functional.resize(image, list(size), InterpolationMode(self.recipe.interpolation))
            return pil_to_tensor(image), Scene(index, own, size, found)
        return self._augmented(image, found.learned(), index, name)

    def _augmented(self, image: Image.Image, objects: Objects, index: int, name: str) -> tuple[Tensor, Scene]:
        assert self.augment is not None
        own = objects.size
        given: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=own),
            "labels": objects.labels,
        }
        if self.masks:
            try:
                given["masks"] = tv_tensors.Mask(objects.masks())
            except ImageError as error:
                raise ImageError(f"{name}: {error}") from error
        try:
            pixels, seen = self.augment(image, given)
        except ValueError as error:  # of Pillow, for a side of no pixel
            raise ImageError(f"{name}: {own[1]}x{own[0]} pixels are too narrow to be resized") from error
        boxes, masks = seen["boxes"].as_subclass(Tensor), seen.get("masks")
        size = (pixels.shape[-2], pixels.shape[-1])
        found = Objects(boxes, seen["labels"], torch.zeros(len(boxes), dtype=torch.bool), box_area(boxes), size)
        return pixels, Scene(index, own, size, found, None if masks is None else masks.as_subclass(Tensor))


class RandomPart(v2.Transform):
    """A part of an image whose height and width are drawn, at a place that is drawn.

    sides: the least and the most pixels of a side; of a smaller image all is taken.
    """

    def __init__(self, sides: tuple[int, int]) -> None:
        super().__init__()
        self.sides = sides

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where the part lies."""
        whole = v2.functional.get_size(flat_inputs[0])
        low, high = self.sides
        part = [int(torch.randint(min(low, side), min(high, side) + 1, ())) for side in whole]
        top, left = (int(torch.randint(0, side - seen + 1, ())) for side, seen in zip(whole, part, strict=True))
        return {"top": top, "left": left, "height": part[0], "width": part[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The part of an image, of boxes or of masks."""
        return v2.functional.crop(inpt, **params)


def augmentation(recipe: Any) -> v2.Transform:
    """The augmentation of an image and its objects, by torchvision: mirror image, colours, a part of it, its size."""
    sides, how = list(recipe.sides), InterpolationMode(recipe.interpolation)
    steps: list[v2.Transform] = [v2.RandomHorizontalFlip(recipe.hflip)]
    if recipe.color_jitter and recipe.in_chans == 3:
        steps.append(v2.ColorJitter(*[recipe.color_jitter] * 3))
    if recipe.part:
        first = [max(round(share * max(sides)), 1) for share in _FIRST]
        low, high = (max(round(share * max(sides)), 1) for share in _PARTS)
        part = [v2.RandomShortestSize(first, interpolation=how), RandomPart((low, high))]
        steps.append(v2.RandomApply(part, recipe.part))
    steps.append(v2.RandomShortestSize(sides, recipe.longest, interpolation=how))
    return v2.Compose([*steps, v2.PILToTensor(), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


def within(size: tuple[int, int], shorter: int, longest: int) -> tuple[int, int]:
    """Height and width where the shorter side is made `shorter`, the longer one `longest` at most; 0 leaves them."""
    if not shorter:
        return size
    low, high = min(size), max(size)
    height, width = (max(min(scaled(side, shorter, low), scaled(side, longest, high)), 1) for side in size)
    return height, width


def open_objects(recipe: Any) -> Data:
    """The two sources of a recipe whose images have objects, with the same classes.

    Raises:
        LinsightError: nothing there, damaged files, no object to learn or to find, or other classes to evaluate on.
    """
    place, data = _place(recipe), shown(recipe.data)
    train_split = picked_split(place, recipe.train_split, recipe)
    val_split = picked_split(place, recipe.val_split, recipe) if recipe.val_split else evaluated_split(place, recipe)
    whole = place.open(train_split)
    notes = list(whole.notes)
    train: Source = whole
    val: Source
    if val_split is None:
        kept, held = hold_out(whole.targets, recipe.val_fraction)
        train, val = Part(whole, kept), Part(whole, held)
        notes.append(f"{data} has no split to evaluate on: {len(held)} of its {len(whole)} images are held out")
    else:
        val = place.open(val_split).under(whole.classes)
        notes += [f"{val_split}: {note}" for note in val.notes]
    for source, what in ((train, "to learn from"), (val, "to find")):
        if not any(len(source.beside(index).learned().boxes) for index in range(len(source))):
            why = f" ({source.notes[0]})" if source.notes else ""
            raise LinsightError(f"{data} has no object {what} in its {len(source)} images{why}")
    if recipe.num_classes not in (None, len(whole.classes)):
        raise LinsightError(f"num_classes={recipe.num_classes}, but {data} has {len(whole.classes)} classes")
    return Data(train, val, whole.classes, tuple(notes))


def open_evaluated_objects(recipe: Any, split: str | None, classes: tuple[str, ...]) -> Source:
    """The images to evaluate a detector of `classes` on: a split.

    Raises:
        LinsightError: no such split, or objects of classes that the model does not know.
    """
    place, wanted = _place(recipe), split or recipe.val_split
    chosen = picked_split(place, wanted, recipe) if wanted else evaluated_split(place, recipe)
    if chosen is None:
        raise LinsightError(f"{shown(recipe.data)} has no split to evaluate on: name one with val_split=")
    return place.open(chosen).under(classes)


def _place(recipe: Any) -> CocoFolder:
    folder = located(recipe.data)
    if not folder.is_dir():
        raise LinsightError(f"no such data folder: {shown(recipe.data)}: give one with images and annotations/ in it")
    return CocoFolder(folder, masks="mask" in recipe.method)
