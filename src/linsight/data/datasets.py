"""`open_data`: from what a user calls the data to a training and an evaluation source that agree."""

import dataclasses
from collections.abc import Sequence

from linsight.errors import LinsightError, UnknownNameError
from linsight.recipe import Recipe

from ._layout import alike, plain, role
from ._places import Digits, Pictures, Place, locate
from ._streams import Stream, Streamed
from .random import hold_out
from .sources import Part, Source
from .trees import count, shown, some

_EVALUATION = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class Data:
    """Images that a run trains on and is evaluated on. `notes` are choices that a user should hear of."""

    train: Source
    val: Source
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_data(recipe: Recipe) -> Data:
    """The two sources of a recipe, with the same classes.

    The first folder below a split is the class of an image, in folders and in archives; names of splits are known in
    any case. What is ambiguous is refused.

    Raises:
        LinsightError: nothing there, a class without images, labels that are missing, or splits whose
            classes differ.
    """
    place, data = locate(recipe), shown(recipe.data)
    train_split = picked_split(place, recipe.train_split, recipe)
    if isinstance(place, Streamed):
        return _streams(place, train_split, recipe)
    val_split = picked_split(place, recipe.val_split, recipe) if recipe.val_split else evaluated_split(place, recipe)
    notes = list(place.notes)
    train = _checked(place.open(train_split), _called(recipe, train_split))
    notes += train.notes
    if len(train.classes) < 2:
        way = ""
        if isinstance(place, Pictures):
            inner = "/".join([recipe.data, *filter(None, [train_split]), train.classes[0]])
            way = f"; the first folder is the class: if the folders in it are the classes, give {shown(inner)}"
        only = shown(train.classes[0])
        raise LinsightError(f"{data} has one class only ({only}): there is nothing to learn{way}")
    if val_split is None:
        train, val = _held_out(train, recipe)
        if not isinstance(place, Digits):
            held = f"{len(val)} of its {len(train) + len(val)} images are held out"
            notes.append(f"{data} has no split to evaluate on: {held}")
    else:
        if recipe.val_split is None and role(val_split) == "test":
            notes.append(f"{data} has no validation split: evaluated on {val_split}")
        val = _checked(place.open(val_split), _called(recipe, val_split))
        notes += [f"{val_split}: {note}" for note in val.notes]
        val = _same_classes(train, val, (str(train_split), val_split), recipe, notes)
    notes += [f"{data} has the classes {shown(one)} and {shown(two)}" for one, two in alike(train.classes)]
    for source, name in ((train, "to train on"), (val, "to evaluate on")):
        there = set(source.targets)
        if none := [name for index, name in enumerate(source.classes) if index not in there]:
            notes.append(f"{data} has no image {name} of {len(none)} of {len(train.classes)} classes: {some(none)}")
    if recipe.num_classes is not None and recipe.num_classes < len(train.classes):
        raise LinsightError(f"num_classes={recipe.num_classes}, but {data} has {len(train.classes)} classes")
    return Data(train, val, train.classes, tuple(dict.fromkeys(notes)))


def _streams(place: Streamed, train_split: str | None, recipe: Recipe) -> Data:
    """The two streams of a recipe, with the same classes, as far as these are known before they are read."""
    data, val_split = shown(recipe.data), recipe.val_split
    val_split = picked_split(place, val_split, recipe) if val_split else evaluated_split(place, recipe)
    if val_split is None:
        raise LinsightError(
            f"{data} has no split to evaluate on among {some(place.splits)}, and a stream holds nothing out: name one "
            "with val_split=, or use hfds/"
        )
    train, val = place.open(train_split), place.open(val_split)
    if not train.classes:
        raise LinsightError(
            f"{data} does not tell its classes before it is read: say how many with num_classes=, where they are "
            "numbers, or use hfds/"
        )
    if recipe.num_classes is not None and recipe.num_classes < len(train.classes):
        raise LinsightError(f"num_classes={recipe.num_classes}, but {data} has {len(train.classes)} classes")
    if isinstance(train, Stream):
        train.length = recipe.epoch_images or train.length
        if train.length is None:
            raise LinsightError(
                f"{data} does not tell how many images it has: say how many an epoch has, epoch_images="
            )
    told = recipe.val_split is None and role(val_split) == "test"
    notes = (f"{data} has no validation split: evaluated on {val_split}",) if told else ()
    return Data(train, under(val, train.classes, recipe.data), train.classes, notes)


def open_evaluation(recipe: Recipe, split: str | None, classes: tuple[str, ...], in_order: bool = False) -> Source:
    """The images to evaluate a model of `classes` on: a split, or all of a folder that has none.

    A folder may lack some of the classes; it may not have others, unless they are taken `in_order`,
    as many as there are of the model's.
    """
    recipe = recipe.changed(val_split=split or recipe.val_split)
    place = locate(recipe)
    if place.splits:
        name = picked_split(place, recipe.val_split, recipe) if recipe.val_split else evaluated_split(place, recipe)
        if name is None:
            raise LinsightError(
                f"{shown(recipe.data)} has no split to evaluate on among {some(place.splits)}: name one with val_split="
            )
        source = place.open(name)
    elif split is not None:
        raise UnknownNameError(f"split of {shown(recipe.data)}", split, ())
    else:
        source = place.open(None)
        if isinstance(place, Digits):  # its held-out part is its test split
            source = Part(source, hold_out(source.targets, recipe.val_fraction)[1])
    found = under(_checked(source, recipe.data), classes, recipe.data, in_order)
    found.notes = (*place.notes, *found.notes)
    return found


def under(source: Source, classes: tuple[str, ...], data: str, in_order: bool = False) -> Source:
    """A source under the classes of a model, which are found by their names, whatever the order.

    in_order: for classes of which no name is the model's: those that are numbers are taken for places, and others, as
        many as there are of the model's, in their order.

    Raises:
        LinsightError: images of a class that the model was not trained on.
    """
    if source.classes == classes:
        return source
    if isinstance(source, Stream):
        return source.under(classes)
    known = set(map(plain, classes))
    used = set(source.targets)
    others = [name for index, name in enumerate(source.classes) if index in used and plain(name) not in known]
    if others and in_order and not set(map(plain, source.classes)) & known:
        if all(name.isdecimal() and int(name) < len(classes) for name in source.classes):
            return _taken(source, [classes[int(name)] for name in source.classes], classes)
        if len(source.classes) == len(classes):
            return _taken(source, classes, classes)
    if others:
        more = f" ({len(others)} such classes)" if others[1:] else ""
        raise LinsightError(
            f"{shown(data)} has the class {shown(others[0])}, which the model was not trained on{more}: it knows "
            f"{some(classes)}"
        )
    return Part(source, range(len(source)), classes)


def _taken(source: Source, names: Sequence[str], classes: tuple[str, ...]) -> Source:
    """A source whose classes are called otherwise, under those of a model."""
    called = Part(source, range(len(source)))
    called.classes = tuple(names)
    part = Part(called, range(len(source)), classes)
    part.notes = (*source.notes, f"the class {shown(source.classes[0])} is taken for {shown(names[0])}, and so on")
    return part


def picked_split(place: Place, wanted: str, recipe: Recipe) -> str | None:
    """The split that a user calls `wanted`; None where there are no splits, and none was named."""
    base = wanted.partition("[")[0] if place.exact else wanted  # train of train[:10%]
    rest = wanted[len(base) :]
    if not place.splits:
        if base in ("train", ""):
            return wanted if rest else None
        raise UnknownNameError(f"split of {shown(recipe.data)}", wanted, ())
    usual = wanted == "train"
    if base in place.splits and (place.exact or not usual):
        return wanted
    found = [name for name in place.splits if name.casefold() == base.casefold() and not usual]
    if not found and role(base):
        found = [name for name in place.splits if role(name) == role(base)]
    if len(found) > 1:
        raise _several(found, "train_split" if usual else "val_split", recipe)
    if not found:
        if usual:
            raise LinsightError(
                f"{shown(recipe.data)} has the split{'s' * (len(place.splits) > 1)} {some(place.splits)}, and none to "
                "train on: name it with train_split="
            )
        raise UnknownNameError(f"split of {shown(recipe.data)}", wanted, place.splits)
    return found[0] + rest


def evaluated_split(place: Place, recipe: Recipe) -> str | None:
    """The split to evaluate on where a user names none: validation, else test."""
    for purpose in _EVALUATION:
        found = [name for name in place.splits if role(name) == purpose]
        if place.exact and purpose in found:
            return purpose
        if len(found) > 1:
            raise _several(found, "val_split", recipe)
        if found:
            return found[0]
    return None


def _several(found: list[str], field: str, recipe: Recipe) -> LinsightError:
    return LinsightError(
        f"{shown(recipe.data)} has the splits {some(found)}, which are for one purpose: name one with {field}=, or "
        "move the others out"
    )


def _called(recipe: Recipe, split: str | None) -> str:
    return f"{recipe.data}, split {split}" if split else recipe.data


def _held_out(whole: Source, recipe: Recipe) -> tuple[Source, Source]:
    """The images to train on, and a share of each class, held out."""
    train, val = hold_out(whole.targets, recipe.val_fraction)
    left = {whole.targets[index] for index in train}
    if scarce := [whole.classes[target] for target in sorted(set(whole.targets) - left)]:
        raise LinsightError(
            f"{count(len(scarce), 'class', 'classes')} of {shown(recipe.data)} with too few images to hold one out "
            f"({some(scarce)}): add some, or give it a val folder"
        )
    return Part(whole, train), Part(whole, val)


def _same_classes(train: Source, val: Source, splits: tuple[str, str], recipe: Recipe, notes: list[str]) -> Source:
    """The source `val` under the classes of `train`, of which it may lack some."""
    if train.classes == val.classes:
        return val
    known = set(train.classes)
    if others := [name for name in val.classes if name not in known]:
        lacking = [name for name in train.classes if name not in val.classes]
        odd = sorted(others + lacking)
        sides = [f"{split}: {some(names)}" for split, names in zip(splits, (lacking, others), strict=True) if names]
        raise LinsightError(
            f"the splits of {shown(recipe.data)} have different classes: {shown(odd[0])} is in one of them only "
            f"({'; '.join(sides)}): give them the same folders"
        )
    return Part(val, range(len(val)), train.classes)


def _checked(source: Source, name: str) -> Source:
    if isinstance(source, Stream):
        return source
    if not len(source):
        raise LinsightError(f"{shown(name)} has no image")
    for index, target in enumerate(source.targets):
        if not 0 <= target < len(source.classes):
            raise LinsightError(f"{shown(source.name(index))} of {shown(name)} has no label")
    return source
