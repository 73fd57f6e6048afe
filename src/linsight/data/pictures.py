"""The reader of pictures: every file, array or image of Pillow's that a command is given goes through it.

Every picture is upright, as its orientation says, and of its first frame; 16 bits are scaled, never clipped;
transparent colours lie on white; colour profiles are left alone. What cannot be read is an ImageError of one line,
whatever library failed.
"""

import contextlib
import io
import logging
import os
import pathlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from linsight.errors import ImageError, LinsightError, MissingExtraError

from .kinds import suffix_of
from .pillow import Pillow, orientation_of
from .readers import DARK, EXTRA, TURNS, Plain, Reader, Slide, Turned, Wanted
from .values import check_fill, known_white, over_white, survey, white_of

# Weights of red, green and blue: ITU-R BT.601, as rounded in Pillow's mode L.
_GREY = np.array([19595, 38470, 7471]) / 2**16
# Modes of Pillow that a decoded picture can have. CMYK stands for four channels of any meaning, as Pillow would take
# the fourth of RGBA for opacity when it resizes.
MODES = {"L": 1, "RGB": 3, "CMYK": 4}
SLIDES = {".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi", ".dcm"}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NUMPY = b"\x93NUMPY"
_TWELVE_BITS = 2**12
_calm = threading.RLock()

for _library in ("PIL", "tifffile"):  # they say of damaged files what our errors say
    logging.getLogger(_library).addHandler(logging.NullHandler())


class Picture:
    """A file as an array `(height, width, channels)` with the channels that a model takes, of which slices are read.

    Transparent colours are laid on white, grey is repeated, and colours are made grey for a model of one channel.

    Args:
        reader: of the file.
        channels: as many as the model takes.
        name: of the file, in messages.
        fill: the value of pixels that are no number, in the file's units.
        any_range: floats are taken as they are; else they are of 0 to 1 or of 0 to 255.

    Raises:
        ImageError: other channels, values in no such range, or values that are no number without a fill.
    """

    def __init__(
        self, reader: Reader, channels: int, name: str, *, fill: float | None = None, any_range: bool = False
    ) -> None:
        height, width, own = reader.shape
        if own != channels and not (own in (1, 2, 3, 4) and channels in (1, 3)):
            raise ImageError(f"{name}: has {own} channels a pixel, and the model takes {channels}")
        check_fill(fill)
        self.reader, self.shape, self.name, self.fill = reader, (height, width, channels), name, fill
        self.alpha = reader.alpha if own != channels else ""
        self.notes = reader.notes
        if own in (2, 4) and own != channels and not self.alpha:
            self.notes = (*self.notes, EXTRA)
        self.dtype = np.dtype(np.uint8) if reader.dtype.kind == "b" else reader.dtype
        known = known_white(self.dtype, name)
        if known is None:
            extent = survey(reader.read, (height, width), name, fill)
            known = 1.0 if any_range and self.dtype.kind == "f" else white_of(self.dtype, extent, name)
            if fill is not None and not any_range and not 0 <= fill <= known:
                raise LinsightError(f"fill={fill:g} is no value of {name}, whose pixels are of 0 to {known:g}")
        self.white = known

    def __getitem__(self, place: tuple[slice, slice]) -> Any:
        pixels = self.reader.read(*place)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.dtype.kind == "b":
            pixels = pixels.astype(np.uint8) * 255
        if self.fill is not None and pixels.dtype.kind == "f":
            pixels = np.where(np.isfinite(pixels), pixels, pixels.dtype.type(self.fill))
        channels = self.shape[2]
        if pixels.shape[2] in (2, 4) and pixels.shape[2] != channels:
            premultiplied = self.alpha == "premultiplied"
            pixels = over_white(pixels, self.white, premultiplied) if self.alpha else pixels[..., :-1]
        if pixels.shape[2] == channels:
            return pixels
        if channels == 1:
            grey = pixels @ _GREY
            return (grey if pixels.dtype.kind == "f" else np.floor(grey + 0.5)).astype(pixels.dtype)[..., None]
        return np.repeat(pixels, channels, axis=2)


class Decoded(NamedTuple):
    """A picture decoded whole, in 8 bits; `notes` say of what it is not as its file is."""

    image: Image.Image
    notes: tuple[str, ...]


def decode(stored: Any, mode: str, name: str = "the image", fill: float | None = None, draft: int = 0) -> Decoded:
    """Decode a picture whole, in a mode of `MODES`.

    Args:
        stored: a path, an open file or its bytes, an array `(H, W)` or `(H, W, channels)`, a tensor `(H, W)` or
            `(channels, H, W)`, or an image of Pillow's.
        mode: "L", "RGB", or "CMYK" for any four channels.
        name: of the picture, in messages.
        fill: the value of pixels that are no number, in the picture's units.
        draft: decode JPEGs at 1/2, 1/4 or 1/8 of their size, where their shorter side has so many pixels or more then,
            which is quicker, and gives other pixels than to resize the whole; 0: decode the whole.

    Raises:
        ImageError: it is damaged, no picture, of a kind that cannot be read, or has more than
            `2 * PIL.Image.MAX_IMAGE_PIXELS` pixels.
        MissingExtraError: its kind needs a package that is not installed.
    """
    most = None if Image.MAX_IMAGE_PIXELS is None else 2.0 * Image.MAX_IMAGE_PIXELS
    wanted = Wanted(MODES[mode], most=most, draft=draft)
    if isinstance(stored, torch.Tensor):
        stored = _array_of(stored)
    if isinstance(stored, np.ndarray) and stored.dtype == np.uint8 and stored.shape[2:] in ((), (3,)):
        stored = Image.fromarray(stored)
        if stored.mode == mode:  # as a cache in memory has them, by the thousand
            wanted.check(stored.height, stored.width, name)
            return Decoded(stored, ())
    with calmly(name):
        reader = _reader(stored, wanted, name)
        try:
            if isinstance(reader, Pillow) and reader.image.mode in ("L", "RGB") and mode in ("L", "RGB"):
                return Decoded(reader.image.convert(mode), reader.notes)
            picture = Picture(reader, wanted.channels, name, fill=fill)
            height, width, _ = picture.shape
            pixels, notes = picture[0:height, 0:width], picture.notes
            if pixels.dtype == np.uint16 and 0 < pixels.max() < _TWELVE_BITS:
                notes = (*notes, DARK)
            return Decoded(_eight_bits(pixels, picture.white, mode), notes)
        finally:
            if not isinstance(stored, Image.Image):
                reader.close()


def _array_of(pixels: torch.Tensor) -> Any:
    """A tensor as an array, its channels last."""
    pixels = pixels.detach().cpu()
    pixels = pixels.float() if pixels.dtype in (torch.bfloat16, torch.float16) else pixels
    return pixels.movedim(0, -1).numpy() if pixels.ndim == 3 else pixels.numpy()


def _eight_bits(pixels: Any, white: float, mode: str) -> Image.Image:
    """Pixels `(h, w, channels)` as an image of Pillow's."""
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels.astype(np.float32) * (255 / white)).clip(0, 255).astype(np.uint8)
    height, width, _ = pixels.shape
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels).tobytes())


def stored_orientation(stored: Any, name: str) -> int:
    """How a picture is stored, as EXIF or TIFF have it: 1 for upright, and where nobody tells.

    Raises:
        ImageError: it cannot be read.
    """
    if isinstance(stored, np.ndarray | torch.Tensor):
        return 1
    with calmly(name):
        if isinstance(stored, Image.Image):
            return orientation_of(stored)
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
            return orientation_of(image)


@contextlib.contextmanager
def opened(
    image: Any,
    channels: int,
    *,
    level: int | None = None,
    mpp: float | None = None,
    fill: float | None = None,
    any_range: bool = False,
) -> Iterator[tuple[Any, str]]:
    """An array to slice, and its name: `image` itself, or the `Picture` that reads it where it is the path of a file.

    Args:
        image: a path, or anything else.
        channels: as many as the model takes.
        level: which level of a pyramid, the first by default.
        mpp: or the level nearest to so many microns a pixel.
        fill: the value of pixels that are no number, in the file's units.
        any_range: floats of .npy files are taken as they are.

    Raises:
        ImageError: no such file, or it is damaged, or of a kind that cannot be read.
        LinsightError: no such level.
        MissingExtraError: its kind needs a package that is not installed.
    """
    if not isinstance(image, str | os.PathLike):
        if level is not None or mpp is not None:
            raise LinsightError("level= and mpp= are for files: slice an array of the level that you want")
        yield image, "the image"
        return
    path = pathlib.Path(image)
    name = f"'{path}'"
    with calmly(name):
        reader = _reader(path, Wanted(channels, level, mpp), name)
    try:
        with calmly(name):
            plain = any_range and isinstance(reader, Plain)
            picture = Picture(reader, channels, name, fill=fill, any_range=plain)
        yield picture, name
    finally:
        reader.close()


def first_line(error: BaseException) -> str:
    """The message of an error, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def calmly(name: str) -> Iterator[None]:
    """While entered, libraries do not warn, and any error of theirs is an ImageError."""
    with _calm, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except LinsightError:
            raise
        except UnidentifiedImageError as error:
            raise ImageError(f"{name}: not an image") from error
        except Exception as error:  # any error of the library behind it
            raise ImageError(f"{name}: cannot be read: {first_line(error)}") from error


def _reader(stored: Any, wanted: Wanted, name: str) -> Reader:
    """The reader for what is stored; what a file is, its first bytes say before its name does."""
    if isinstance(stored, Image.Image):
        return Pillow(stored, wanted, name)
    if isinstance(stored, np.ndarray):
        return Plain(stored, wanted, name)
    source, suffix, head = _source(stored, name)
    if suffix in SLIDES:
        return Slide(str(source), wanted, name)
    if not head:
        raise ImageError(f"{name}: is empty")
    if head.startswith(_NUMPY):
        return Plain(_array(source), wanted, name)
    if head.startswith(_TIFF):
        return _tiff(source, wanted, name)
    return Pillow(source, wanted, name)


def _source(stored: Any, name: str) -> tuple[Any, str, bytes]:
    """The path, or a file in memory; the extension, and the first bytes."""
    if isinstance(stored, str | os.PathLike):
        path = pathlib.Path(stored)
        if not path.is_file():
            raise ImageError(f"{name} is a folder: give image files" if path.is_dir() else f"no such image: {name}")
        with path.open("rb") as file:
            head = file.read(8)
        source: Any = path
        suffix = suffix_of(path)
    else:
        data = stored if isinstance(stored, bytes) else stored.read()
        source, suffix, head = io.BytesIO(data), "", data[:8]
    return source, suffix, head


def _array(source: Any) -> Any:
    """The array of a .npy file, of which only what is asked for is read where it has a path."""
    if isinstance(source, io.BytesIO):
        return np.load(source, allow_pickle=False)
    return np.lib.format.open_memmap(source, "r")


def _tiff(source: Any, wanted: Wanted, name: str) -> Reader:
    """A TIFF file in parts, or, where it is of a kind that is not read so, whole through Pillow."""
    from .tiff import OtherKind, Tiff

    try:
        reader = Tiff(source, wanted, name)
    except Exception as error:  # any error of the library behind it
        elsewhere = isinstance(error, OtherKind | MissingExtraError)
        if isinstance(error, LinsightError) and not elsewhere:
            raise
        try:
            if isinstance(source, io.BytesIO):
                source.seek(0)
            return Pillow(source, wanted, name)
        except Exception as second:
            raise (error if elsewhere else second) from None  # the one that says more
    return reader if reader.orientation not in TURNS else Turned(reader, reader.orientation)
