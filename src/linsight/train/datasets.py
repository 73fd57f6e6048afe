"""`open_data`: from what a user calls the data to a training and an evaluation source that agree."""

import dataclasses
import pathlib

from linsight.errors import LinsightError, UnknownNameError
from linsight.recipe import Recipe

from . import _sources as sources
from ._sources import Part, Source
from .random import hold_out

_EVALUATION = ("validation", "val", "valid", "test", "eval")
_ITERABLE = ("hfids", "tfds", "wds")


@dataclasses.dataclass(frozen=True)
class Data:
    """Images that a run trains on and is evaluated on. `notes` are choices that a user should hear of."""

    train: Source
    val: Source
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_data(recipe: Recipe) -> Data:
    """The two sources of a recipe, with the same classes.

    Raises:
        LinsightError: nothing there, a class without images, labels that are missing, or splits whose
            classes differ.
    """
    place = _locate(recipe.data)
    splits = _splits(place, recipe)
    notes: list[str] = []
    train_split = _pick(splits, (recipe.train_split,), recipe.data) if splits else None
    if splits is None or (recipe.val_split is None and not set(_EVALUATION) & set(splits)):
        whole = _checked(_open(place, train_split, recipe), recipe.data)
        train_indices, val_indices = hold_out(whole.targets, recipe.val_fraction)
        if len(set(map(whole.targets.__getitem__, train_indices))) < len(set(whole.targets)):
            raise LinsightError(f"a class of '{recipe.data}' has too few images to hold one out: give it a val folder")
        if place[0] != "digits":
            held = f"{len(val_indices)} of its {len(whole)} images are held out"
            notes.append(f"'{recipe.data}' has no split to evaluate on: {held}")
        train: Source = Part(whole, train_indices)
        val: Source = Part(whole, val_indices)
    else:
        val_split = _pick(splits, (recipe.val_split,) if recipe.val_split else _EVALUATION, recipe.data)
        if recipe.val_split is None and val_split == "test":
            notes.append(f"'{recipe.data}' has no validation split: evaluated on test")
        train = _checked(_open(place, train_split, recipe), f"{recipe.data}, split {train_split}")
        val = _checked(_open(place, val_split, recipe), f"{recipe.data}, split {val_split}")
    if len(train.classes) < 2:
        raise LinsightError(f"'{recipe.data}' has one class only ('{train.classes[0]}'): there is nothing to learn")
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise LinsightError(f"the splits of '{recipe.data}' have different classes: '{odd[0]}' is in one of them only")
    if recipe.num_classes is not None and recipe.num_classes < len(train.classes):
        raise LinsightError(f"num_classes={recipe.num_classes}, but '{recipe.data}' has {len(train.classes)} classes")
    return Data(train, val, train.classes, tuple(notes))


def open_evaluation(recipe: Recipe, split: str | None, classes: tuple[str, ...], in_order: bool = False) -> Source:
    """The images to evaluate a model of `classes` on: a split, or all of a folder that has none.

    A folder may lack some of the classes; it may not have others, unless they are taken `in_order`,
    as many as there are of the model's.
    """
    place = _locate(recipe.data)
    splits = _splits(place, recipe)
    if splits is not None:
        names = (split or recipe.val_split,) if split or recipe.val_split else _EVALUATION
        source = _open(place, _pick(splits, names, recipe.data), recipe)
    elif split is not None:
        raise UnknownNameError(f"split of '{recipe.data}'", split, ())
    else:
        source = _open(place, None, recipe)
        if place[0] == "digits":  # its held-out part is its test split
            source = Part(source, hold_out(source.targets, recipe.val_fraction)[1])
    source = _checked(source, recipe.data)
    if source.classes == classes:
        return source
    if in_order and len(source.classes) == len(classes) and not set(source.classes) & set(classes):
        return source
    other = next((name for name in source.classes if name not in classes), None)
    if other is not None:
        raise LinsightError(f"'{recipe.data}' has the class '{other}', which the model was not trained on")
    return Part(source, range(len(source)), classes)


def _locate(data: str) -> tuple[str, str]:
    """The kind of the data, and its name or path."""
    if data == "digits":
        return "digits", data
    prefix, slash, rest = data.partition("/")
    path = pathlib.Path(data).expanduser()
    if slash and not path.exists():
        if prefix in _ITERABLE:
            raise LinsightError(f"'{data}' is read as a stream: use data in random access (a folder, a tar, hfds/)")
        if prefix == "torch":
            return "torch", data
        if prefix == "hfds":
            return "hfds", rest
    if not path.exists():
        raise LinsightError(f"no such data folder: '{data}'")
    if path.is_file():
        if path.suffix != ".tar":
            raise LinsightError(f"'{data}' is no data: give a folder, a .tar, or a name such as torch/cifar10")
        return "tar", str(path)
    if (path / "train.tar").exists():
        return "tars", str(path)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        raise LinsightError(f"'{data}' was written by save_to_disk: write it with to_parquet instead")
    if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return "hfds", str(path)
    return "folder", str(path)


def _splits(place: tuple[str, str], recipe: Recipe) -> list[str] | None:
    """The names of the splits, None where there is only one body of images."""
    kind, path = place
    if kind == "torch":
        return ["train", "validation", "test"]
    if kind == "hfds":
        names = sources.hugging_face_splits(path)
        return names if _base(recipe.train_split) in names else None
    if kind == "tars":
        return [file.stem for file in sorted(pathlib.Path(path).glob("*.tar"))]
    if kind == "folder":
        names = [folder.name for folder in sorted(pathlib.Path(path).iterdir()) if folder.is_dir()]
        known = {recipe.train_split, recipe.val_split, *_EVALUATION}
        return [name for name in names if name in known] if recipe.train_split in names else None
    return None


def _base(split: str) -> str:
    """The split that a part is of, in Hugging Face's words: train of train[:10%]."""
    return split.partition("[")[0]


def _pick(splits: list[str], wanted: tuple[str | None, ...], data: str) -> str:
    for name in wanted:
        if name and _base(name) in splits:
            return name
    if len(wanted) == 1:
        raise UnknownNameError(f"split of '{data}'", str(wanted[0]), splits)
    raise LinsightError(f"'{data}' has no split to evaluate on among {', '.join(splits)}: name one with val_split=")


def _open(place: tuple[str, str], split: str | None, recipe: Recipe) -> Source:
    kind, path = place
    if kind == "digits":
        return sources.digits()
    if kind == "torch":
        return sources.torchvision(path, recipe.data_dir, split or "train")
    if kind == "hfds":
        split = split or sources.hugging_face_splits(path)[0]
        return sources.hugging_face(path, recipe.data_dir, split, recipe.image_key, recipe.label_key)
    if kind == "tar":
        return sources.tar(pathlib.Path(path))
    if kind == "tars":
        return sources.tar(pathlib.Path(path, f"{split or 'train'}.tar"))
    return sources.class_folders(pathlib.Path(path, split) if split else pathlib.Path(path))


def _checked(source: Source, name: str) -> Source:
    if not len(source):
        raise LinsightError(f"'{name}' has no image")
    for index, target in enumerate(source.targets):
        if not 0 <= target < len(source.classes):
            raise LinsightError(f"'{source.name(index)}' of '{name}' has no label")
    return source
