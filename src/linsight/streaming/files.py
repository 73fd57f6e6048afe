"""Image files, of which only what is asked for is read: NumPy arrays, TIFF, whole slides, and what Pillow opens."""

import contextlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from linsight.errors import ImageError, LinsightError, MissingExtraError
from linsight.runtime.memory import free_memory, in_words

_GREY = (
    np.array([19595, 38470, 7471]) / 2**16
)  # weights of red, green and blue: ITU-R BT.601, as rounded in Pillow's mode L
_ARRAY_MODES = {"L", "LA", "RGB", "RGBA", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_opening = threading.Lock()


class Reader(Protocol):
    """A reader of one kind of files. `shape` is (height, width, channels a pixel)."""

    shape: tuple[int, int, int]

    def read(self, rows: slice, columns: slice) -> Any:
        """Pixels of a rectangle, `(h, w)` or `(h, w, channels)`."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Picture:
    """A file as an array `(height, width, channels)` with the channels that a model takes.

    Alpha is dropped, grey repeated, and colours are made grey for a model of one channel.

    Raises:
        ImageError: the channels of the file are none of these.
    """

    def __init__(self, reader: Reader, channels: int, name: str) -> None:
        height, width, own = reader.shape
        if own != channels and not (own in (1, 2, 3, 4) and channels in (1, 3)):
            raise ImageError(f"{name} has {own} channels a pixel, and the model takes {channels}")
        self.reader, self.shape = reader, (height, width, channels)

    def __getitem__(self, place: tuple[slice, slice]) -> Any:
        pixels = self.reader.read(*place)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        channels = self.shape[2]
        if pixels.shape[2] in (2, 4) and pixels.shape[2] != channels:
            pixels = pixels[..., :-1]
        if pixels.shape[2] == channels:
            return pixels
        if channels == 1:
            grey = pixels @ _GREY
            return (grey if pixels.dtype.kind == "f" else np.floor(grey + 0.5)).astype(pixels.dtype)[..., None]
        return np.repeat(pixels, channels, axis=2)


@contextlib.contextmanager
def opened(image: Any, channels: int) -> Iterator[tuple[Any, str]]:
    """An array to slice, and its name: `image` itself, or what reads it where it is the path of a file.

    Raises:
        ImageError: no such file, or it is damaged or of a kind that cannot be read in parts.
        MissingExtraError: its kind needs a package that is not installed.
    """
    if not isinstance(image, str | os.PathLike):
        yield image, "the image"
        return
    path = pathlib.Path(image)
    name = f"'{path}'"
    if not path.is_file():
        raise ImageError(f"{name} is a folder: give image files" if path.is_dir() else f"no such image: {name}")
    try:
        reader = _READERS.get(path.suffix.lower(), _Pillow)(path)
    except LinsightError:
        raise
    except Exception as error:  # any error of the library behind it
        raise ImageError(f"{name} cannot be read: {first_line(error)}") from error
    try:
        yield (reader if isinstance(reader, np.ndarray) else Picture(reader, channels, name)), name
    finally:
        if not isinstance(reader, np.ndarray):
            reader.close()


def first_line(error: BaseException) -> str:
    """The message of an error, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Plain:
    """Pixels that are in an array already."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.shape = (*data.shape, 1)[:3]

    def read(self, rows: slice, columns: slice) -> Any:
        return self.data[rows, columns]

    def close(self) -> None:
        del self.data


def _numpy(path: pathlib.Path) -> Any:
    data = np.lib.format.open_memmap(path, "r")
    # A last axis of channels, or none, is brought to those of the model; other axes are the caller's.
    return _Plain(data) if data.ndim == 2 or (data.ndim == 3 and data.shape[2] <= 4) else data


class _Pillow:
    """Any other picture, decoded whole, as its format gives no parts."""

    def __init__(self, path: pathlib.Path) -> None:
        with _opening:  # Pillow's own limit knows nothing of how much memory there is
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                self.image: Image.Image = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        try:
            self._load(path)
        except BaseException:
            self.image.close()
            raise

    def _load(self, path: pathlib.Path) -> None:
        width, height = self.image.size
        need = width * height * (1 if self.image.mode in ("1", "L", "P") else 4)
        if need > (free := free_memory()).bytes:
            raise ImageError(
                f"'{path}' needs {in_words(need)} of memory, as its format is read whole, and {free} are free: "
                f"save it as a tiled TIFF, or as .npy"
            )
        self.image.load()
        self.shape = (height, width, self._array(slice(0, 1), slice(0, 1)).size)

    def _array(self, rows: slice, columns: slice) -> Any:
        part = self.image.crop((columns.start, rows.start, columns.stop, rows.stop))
        if part.mode in _ARRAY_MODES:
            return np.asarray(part)
        if part.mode == "I":  # how some versions open 16 bits
            return np.asarray(part).clip(0, 65535).astype(np.uint16)
        return np.asarray(part.convert("L" if part.mode == "1" else "RGB"))

    read = _array

    def close(self) -> None:
        self.image.close()


class _Slide:
    """A whole slide at its full resolution, through OpenSlide; what was not scanned has the slide's background."""

    def __init__(self, path: pathlib.Path) -> None:
        try:
            import openslide
        except (ImportError, OSError) as error:  # the latter: the package without its library
            raise MissingExtraError("openslide-python", "slides", f"'{path}', a slide,") from error
        self.slide = openslide.OpenSlide(str(path))
        width, height = self.slide.dimensions
        self.shape = (height, width, 3)
        self.background = f"#{self.slide.properties.get('openslide.background-color', 'ffffff')}"

    def read(self, rows: slice, columns: slice) -> Any:
        size = (columns.stop - columns.start, rows.stop - rows.start)
        region = self.slide.read_region((columns.start, rows.start), 0, size)
        whole = Image.new("RGB", size, self.background)
        whole.paste(region, mask=region.getchannel("A"))
        return np.asarray(whole)

    def close(self) -> None:
        self.slide.close()


def _tiff(path: pathlib.Path) -> Any:
    from .tiff import Tiff

    return Tiff(path)


_READERS: dict[str, Callable[[pathlib.Path], Any]] = {
    ".npy": _numpy,
    **dict.fromkeys((".tif", ".tiff", ".btf", ".tf8"), _tiff),
    **dict.fromkeys((".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi", ".dcm"), _Slide),
}
