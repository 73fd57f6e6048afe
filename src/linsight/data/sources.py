"""Where images come from: each source gives image and class by index, and knows its classes."""

import contextlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image
from timm.data import create_dataset

from linsight.errors import ImageError, LinsightError, MissingExtraError

from ._archives import Archive
from ._layout import Body, plain
from ._sections import digests
from .pictures import Decoded, decode, stored_orientation
from .trees import shown, walk


class Source(Protocol):
    """Images with classes, in random access.

    notes: what a user should hear of.
    shards: the shard of each image, None where they lie in none.
    annotated: True where more than a class belongs to an image, which `beside` gives.
    """

    classes: tuple[str, ...]
    targets: list[int]
    notes: tuple[str, ...]
    shards: Sequence[int] | None = None
    annotated: bool = False

    def __len__(self) -> int: ...

    def stored(self, index: int) -> Any:
        """The image as it is kept: a path, an open file, an array, or an image of Pillow's."""
        ...

    def name(self, index: int) -> str:
        """The name of the image in a message."""
        ...

    def stamp(self) -> str:
        """A digest of the names, sizes and times of its files; "" where it has no files that may be gone over."""
        return ""

    def image(self, index: int, mode: str) -> Image.Image:
        """The image, decoded, in a mode of `linsight.data.pictures.MODES`."""
        return self.decoded(index, mode).image

    def decoded(self, index: int, mode: str, fill: float | None = None, draft: int = 0) -> Decoded:
        """The image, and what is to be told of it; an ImageError where there is none. fill, draft: as of `decode`."""
        stored = self.stored(index)
        with stored if hasattr(stored, "read") else contextlib.nullcontext():
            return decode(stored, mode, self.name(index), fill, draft)

    def beside(self, index: int) -> Any:
        """The mask or the boxes of the image, of a source that is `annotated`; an ImageError where they are damaged."""
        return None

    def orientation(self, index: int) -> int:
        """How the image is stored, as EXIF has it, 1 for upright; images themselves are given upright."""
        stored = self.stored(index)
        with stored if hasattr(stored, "read") else contextlib.nullcontext():
            return stored_orientation(stored, self.name(index))


class Arrays(Source):
    """Images in memory, `(H, W)` or `(H, W, 3)` of uint8, or a line about why there is none.

    They are called by `names`, or else by `label` and their index.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        images: Sequence[Any],
        targets: list[int],
        classes: tuple[str, ...],
        label: str = "image",
        names: Sequence[str] = (),
    ) -> None:
        self.images, self.targets, self.classes, self.label, self.names = images, targets, classes, label, names

    def __len__(self) -> int:
        return len(self.images)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        found = self.images[index]
        if isinstance(found, str):
            raise ImageError(found)
        return found

    def name(self, index: int) -> str:
        """See `Source`."""
        return self.names[index] if self.names else f"{self.label}[{index}]"


class Given(Source):
    """Images as a caller has them, paths, arrays or images of Pillow's; the class of each is its place.

    names: in messages.  classes: of the model that is to see them.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, images: Sequence[Any], names: Sequence[str], classes: tuple[str, ...] = ()) -> None:
        self.images, self.names, self.classes = images, names, classes
        self.targets = list(range(len(images)))

    def __len__(self) -> int:
        return len(self.images)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        return self.images[index]

    def name(self, index: int) -> str:
        """See `Source`."""
        return self.names[index]


class Reading(Source):
    """Images out of files: of folders, archives, Hugging Face data sets. `reader` opens one by its place."""

    def __init__(self, reader: Any, targets: list[int], classes: tuple[str, ...], notes: tuple[str, ...] = ()) -> None:
        self.reader, self.targets, self.classes, self.notes = reader, targets, classes, notes

    def __len__(self) -> int:
        return len(self.targets)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        try:
            return self.reader.open(index)
        except (OSError, ValueError) as error:  # of files that are gone, and of damaged archives
            raise ImageError(f"{self.name(index)}: {first_line(error)}") from error

    def name(self, index: int) -> str:
        """See `Source`."""
        return shown(self.reader.filename(index))[1:-1]

    def stamp(self) -> str:
        """See `Source`."""
        return self.reader.stamp()


class Pairs(Source):
    """A data set of torchvision: pairs of image and class."""

    notes: tuple[str, ...] = ()

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

    def stamp(self) -> str:
        """See `Source`. The files of torchvision are as they were published: that they are there is enough."""
        return repr(self.dataset)


class Part(Source):
    """Some images of a source, under its classes or, by name, under those of another, which has all that are in use."""

    def __init__(self, whole: Source, indices: Sequence[int], classes: tuple[str, ...] = ()) -> None:
        self.whole, self.indices, self.notes = whole, indices, whole.notes
        self.classes = classes or whole.classes
        place = {plain(name): index for index, name in enumerate(self.classes)}
        position = [place.get(plain(name), -1) for name in whole.classes]
        self.targets = [position[whole.targets[i]] for i in indices]
        self.annotated = whole.annotated
        if whole.shards is not None:
            self.shards = [whole.shards[i] for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        return self.whole.stored(self.indices[index])

    def name(self, index: int) -> str:
        """See `Source`."""
        return self.whole.name(self.indices[index])

    def beside(self, index: int) -> Any:
        """See `Source`."""
        return self.whole.beside(self.indices[index])

    def orientation(self, index: int) -> int:
        """See `Source`."""
        return self.whole.orientation(self.indices[index])


class WithPixels(Source):
    """The images of `source` decoded already, as `pixels` has them; all else is as in `source`."""

    annotated = True

    def __init__(self, source: Source, pixels: Source) -> None:
        self.source, self.pixels = source, pixels
        self.classes, self.targets, self.notes = source.classes, source.targets, source.notes
        self.shards = source.shards

    def __len__(self) -> int:
        return len(self.source)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        return self.pixels.stored(index)

    def name(self, index: int) -> str:
        """See `Source`."""
        return self.source.name(index)

    def beside(self, index: int) -> Any:
        """See `Source`."""
        return self.source.beside(index)

    def orientation(self, index: int) -> int:
        """See `Source`."""
        return self.source.orientation(index)


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
    """The image files in a folder and its subfolders, in order; lines on what was left out are added to `aside`.

    Hidden ones are left alone.
    """
    tree = walk(folder)
    if aside is not None:
        aside += [f"in {shown(folder)}: {line}" for line in (tree.left_out(), *tree.notes) if line]
    return [folder / name for name in tree.pictures]


def folder(place: pathlib.Path, body: Body) -> Source:
    """The images of a folder, as its layout says."""
    return Reading(Files(place, body.pictures), body.targets, body.classes, body.notes)


def archive(packed: Archive, inside: str, body: Body) -> Source:
    """The images of a tar or a zip below `inside`, as its layout says."""
    return Reading(_Members(packed, [inside + name for name in body.pictures]), body.targets, body.classes, body.notes)


def torchvision(name: str, data_dir: str | None, split: str) -> Source:
    """A data set of torchvision by timm's name for it: `torch/cifar10`."""
    if data_dir is None:
        raise LinsightError(f"'{name}' needs the folder that it is kept in: --data-dir FOLDER")
    try:
        dataset = create_dataset(name, root=data_dir, split=split)
    except AssertionError as error:
        raise LinsightError(f"'{name}' is no data set that timm knows: {error}") from error
    except (OSError, RuntimeError) as error:
        raise LinsightError(f"'{name}' in '{data_dir}': {first_line(error)}") from error
    targets = [int(target) for target in getattr(dataset, "targets", None) or [pair[1] for pair in dataset]]
    classes = getattr(dataset, "classes", None) or range(max(targets) + 1)
    return Pairs(dataset, targets, tuple(str(entry) for entry in classes))


class Files:
    """Files below a folder, by place."""

    def __init__(self, folder: pathlib.Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def open(self, index: int) -> BinaryIO:
        """A file, undecoded; raises OSError where there is none."""
        return open(self.folder / self.names[index], "rb")

    def filename(self, index: int) -> str:
        """Its name below the folder."""
        return self.names[index]

    def stamp(self) -> str:
        """A digest of the names, sizes and times of all."""
        return self._stamp(str(self.folder / name) for name in self.names)

    def _stamp(self, files: Iterable[str]) -> str:
        return " ".join(digests(files, "\0".join(self.names).encode("utf-8", "surrogatepass")))


class _Members(Files):
    """Files in an archive, by place."""

    def __init__(self, packed: Archive, names: list[str]) -> None:
        super().__init__(pathlib.Path(packed.path), names)
        self.packed = packed

    def open(self, index: int) -> BinaryIO:
        return self.packed.open(self.names[index])

    def stamp(self) -> str:
        return self._stamp([self.packed.path])


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":")
