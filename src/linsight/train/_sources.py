"""Where images come from: each source gives image and class by index, and knows its classes."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import create_reader

from linsight.data import Decoded, decode, is_picture, left_out
from linsight.errors import ImageError, LinsightError, MissingExtraError, UnknownNameError

_LABELS = ("label", "labels", "fine_label", "class")


class Source(Protocol):
    """Images with classes, in random access."""

    classes: tuple[str, ...]
    targets: list[int]

    def __len__(self) -> int: ...

    def stored(self, index: int) -> Any:
        """The image as it is kept: a path, an open file, an array, or an image of Pillow's."""
        ...

    def name(self, index: int) -> str:
        """The name of the image in a message."""
        ...

    def image(self, index: int, mode: str) -> Image.Image:
        """The image, decoded, in a mode of `linsight.data.pictures.MODES`."""
        return self.decoded(index, mode).image

    def decoded(self, index: int, mode: str, fill: float | None = None) -> Decoded:
        """The image, and what is to be told of it; raises an ImageError where there is none. fill: as of `decode`."""
        stored = self.stored(index)
        with stored if hasattr(stored, "read") else contextlib.nullcontext():
            return decode(stored, mode, self.name(index), fill)


class Arrays(Source):
    """Images in memory, `(H, W)` or `(H, W, 3)` of uint8."""

    def __init__(self, images: Sequence[Any], targets: list[int], classes: tuple[str, ...], label: str) -> None:
        self.images, self.targets, self.classes, self.label = images, targets, classes, label

    def __len__(self) -> int:
        return len(self.images)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        return self.images[index]

    def name(self, index: int) -> str:
        """See `Source`."""
        return f"{self.label}[{index}]"


class Reading(Source):
    """A reader of timm: folders, tars, Hugging Face data sets."""

    def __init__(self, reader: Any, targets: list[int], classes: tuple[str, ...]) -> None:
        self.reader, self.targets, self.classes = reader, targets, classes

    def __len__(self) -> int:
        return len(self.targets)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        try:
            return self.reader[index][0]
        except (AssertionError, TypeError) as error:  # timm's way with a row that has no image
            raise ImageError(f"{self.name(index)}: no image there") from error

    def name(self, index: int) -> str:
        """See `Source`."""
        try:
            return str(self.reader.filename(index) or f"image {index}")
        except TypeError:  # no image, so no name either
            return f"image {index}"


class Pairs(Source):
    """A data set of torchvision: pairs of image and class."""

    def __init__(self, dataset: Any, targets: list[int], classes: tuple[str, ...]) -> None:
        self.dataset, self.targets, self.classes = dataset, targets, classes

    def __len__(self) -> int:
        return len(self.dataset)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        return self.dataset[index][0]

    def name(self, index: int) -> str:
        """See `Source`."""
        return f"{type(self.dataset).__name__}[{index}]"


class Part(Source):
    """Some images of a source, under its classes or, by name, under those of another."""

    def __init__(self, whole: Source, indices: Sequence[int], classes: tuple[str, ...] = ()) -> None:
        self.whole, self.indices = whole, indices
        self.classes = classes or whole.classes
        position = [self.classes.index(name) for name in whole.classes]
        self.targets = [position[whole.targets[i]] for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        return self.whole.stored(self.indices[index])

    def name(self, index: int) -> str:
        """See `Source`."""
        return self.whole.name(self.indices[index])


def digits() -> Source:
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("scikit-learn", "train", "the digits data") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return Arrays(images, bunch.target.tolist(), tuple(map(str, range(10))), "digits")


def images_under(folder: pathlib.Path, aside: list[str] | None = None) -> list[pathlib.Path]:
    """The image files in a folder and its subfolders, in order; a line on what was left out is added to `aside`.

    Hidden ones are left alone.
    """
    found: list[pathlib.Path] = []
    others: list[str] = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                if is_picture(name):
                    found.append(pathlib.Path(root, name))
                else:
                    others.append(name)
    if aside is not None and others:
        aside.append(f"in '{folder}': {left_out(others)}")
    return found


def class_folders(folder: pathlib.Path) -> Source:
    """A folder with a subfolder for each class."""
    if not any(folder.iterdir()):
        raise LinsightError(f"the data folder '{folder}' is empty")
    if not images_under(folder):
        raise LinsightError(f"no image in '{folder}' or below it: it should have a folder of images for each class")
    for root, folders, _ in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = pathlib.Path(root)
        if not folders and not images_under(here):
            raise LinsightError(f"the class folder '{here}' has no image: add some, or remove the folder")
    reader = create_reader("", root=str(folder))
    names = _names(reader.class_to_idx)
    if "" in names:
        stray = next(path for path, target in reader.samples if names[target] == "")
        raise LinsightError(f"'{stray}' is in no class folder: move it into one, or out of '{folder}'")
    return Reading(reader, [target for _, target in reader.samples], names)


def tar(path: pathlib.Path) -> Source:
    """A tar with a folder for each class."""
    import tarfile

    try:
        with tarfile.open(path) as file:
            if not any(is_picture(member.name) for member in file):
                raise LinsightError(f"no image in '{path}': it should have a folder of images for each class")
        reader = create_reader("", root=str(path))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise LinsightError(f"'{path}' is no readable tar file: {_first_line(error)}") from error
    return Reading(reader, [int(target) for target in reader.targets], _names(reader.class_name_to_idx))


def torchvision(name: str, data_dir: str | None, split: str) -> Source:
    """A data set of torchvision by timm's name for it: `torch/cifar10`."""
    if data_dir is None:
        raise LinsightError(f"'{name}' needs the folder that it is kept in: --data-dir FOLDER")
    try:
        dataset = create_dataset(name, root=data_dir, split=split)
    except AssertionError as error:
        raise LinsightError(f"'{name}' is no data set that timm knows: {error}") from error
    except (OSError, RuntimeError) as error:
        raise LinsightError(f"'{name}' in '{data_dir}': {_first_line(error)}") from error
    targets = [int(target) for target in getattr(dataset, "targets", None) or [pair[1] for pair in dataset]]
    classes = getattr(dataset, "classes", None) or range(max(targets) + 1)
    return Pairs(dataset, targets, tuple(str(entry) for entry in classes))


def hugging_face(name: str, cache: str | None, split: str, image_key: str | None, label_key: str | None) -> Source:
    """A Hugging Face data set, or a folder of Parquet files: the columns are found by their types."""
    hf = _datasets()
    with _no_progress(hf):
        table = _of_hub(name, lambda: hf.load_dataset(name, split=split, cache_dir=cache))
        image_key = image_key or _column(name, table.features, hf.Image, ("image", "img"), "image_key")
        label_key = label_key or _column(name, table.features, hf.ClassLabel, _LABELS, "label_key")
        for key in (image_key, label_key):
            if key not in table.features:
                raise UnknownNameError(f"column of '{name}'", key, table.features)
        labels = table.select_columns(label_key)[:][label_key]
        if isinstance(table.features[label_key], hf.ClassLabel):
            classes, class_map = tuple(table.features[label_key].names), None
        else:
            known = sorted({label for label in labels if label is not None})
            classes, class_map = tuple(map(str, known)), {label: i for i, label in enumerate(known)}
            labels = [class_map.get(label) for label in labels]
        reader = _of_hub(
            name,
            lambda: create_reader(
                f"hfds/{name}", root=cache, split=split, input_key=image_key, target_key=label_key, class_map=class_map
            ),
        )
    return Reading(reader, [-1 if label is None else label for label in labels], classes)


def hugging_face_splits(name: str) -> list[str]:
    """The names of the splits of a Hugging Face data set or a folder of Parquet files."""
    hf = _datasets()
    with _no_progress(hf):
        return [str(split) for split in _of_hub(name, lambda: hf.get_dataset_split_names(name))]


def _of_hub(name: str, read: Any) -> Any:
    hf = _datasets()
    try:
        return read()
    except (OSError, ValueError, hf.exceptions.DatasetsError) as error:
        raise LinsightError(f"cannot read the data set '{name}': {_first_line(error)}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", "reading Parquet files and Hugging Face data sets") from None
    return datasets


@contextlib.contextmanager
def _no_progress(hf: Any) -> Iterator[None]:
    shown = hf.is_progress_bar_enabled()
    hf.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            hf.enable_progress_bars()


def _column(name: str, features: Mapping[str, Any], kind: type, usual: Sequence[str], field: str) -> str:
    typed = [key for key, feature in features.items() if isinstance(feature, kind)]
    for candidates in (typed, [key for key in usual if key in features]):
        if len(candidates) == 1:
            return candidates[0]
        for key in usual:
            if key in candidates:
                return key
    raise LinsightError(f"'{name}' has the columns {', '.join(features)}: say which to use with {field}=")


def _names(class_to_idx: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
