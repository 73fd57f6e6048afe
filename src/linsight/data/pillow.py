"""Pictures that Pillow opens: decoded whole, upright, in a mode whose channels are told."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from linsight.errors import ImageError
from linsight.runtime.memory import free_memory, in_words

from .readers import FRAMES, Wanted

_opening = threading.Lock()
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS = 274, 258
# Modes that are arrays as they are, with their channels; others are brought to one of them.
_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I": 1, "F": 1, "I;16": 1, "I;16L": 1, "I;16B": 1, "I;16N": 1}
_ALPHA = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}
# Formats whose whole numbers of mode "I" are 16 bits.
_DEEP = {"PNG", "PPM"}
_LAYERED = {"PSD"}  # whose first frame is of all layers together


class Pillow:
    """A picture of Pillow's, of which `image` is the whole."""

    def __init__(self, source: Any, wanted: Wanted, name: str) -> None:
        with _opening:  # Pillow's own limit knows nothing of how much memory there is, nor of streams
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image: Image.Image = source if isinstance(source, Image.Image) else Image.open(source)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        try:
            self._load(image, wanted, name)
        except BaseException:
            image.close()
            raise

    def _load(self, image: Image.Image, wanted: Wanted, name: str) -> None:
        width, height = image.size
        wanted.check(height, width, name)
        if wanted.most is None:
            need = width * height * (1 if image.mode in ("1", "L", "P") else 4)
            if need > (free := free_memory()).bytes:
                raise ImageError(
                    f"{name}: needs {in_words(need)} of memory, as its format is read whole, and {free} are free: "
                    f"save it as a tiled TIFF, or as .npy"
                )
        several = getattr(image, "is_animated", False) and image.format not in _LAYERED
        self.notes: tuple[str, ...] = (FRAMES,) if several else ()
        kind, bits = image.format, _bits(image)
        orientation = orientation_of(image)
        if wanted.draft:
            image.draft(None, (wanted.draft, wanted.draft))  # what is no JPEG takes no notice
        with _libtiff_silent() if kind == "TIFF" else contextlib.nullcontext():
            image.load()
        orientation = 1 if kind == "TIFF" else orientation  # Pillow has turned it
        image = _plain(image)
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        self.image = image
        wanted.one_level(image.height, image.width, name)
        self.alpha = "straight" if image.mode in ("LA", "RGBA") else ""
        self.deep = image.mode == "I" and kind in _DEEP
        self.scale = 65535 / (2**bits - 1) if image.mode.startswith("I;16") and 8 < bits < 16 else 1.0
        self.dtype = np.dtype({"I": np.uint16 if self.deep else np.int32, "F": np.float32}.get(image.mode, np.uint8))
        if image.mode.startswith("I;16"):
            self.dtype = np.dtype(np.uint16)
        self.shape = (image.height, image.width, _CHANNELS[image.mode])

    def read(self, rows: slice, columns: slice) -> Any:
        """See `Reader`."""
        whole = (slice(0, self.image.height), slice(0, self.image.width)) == (rows, columns)
        part = self.image if whole else self.image.crop((columns.start, rows.start, columns.stop, rows.stop))
        pixels = np.asarray(part)
        if self.scale != 1:
            pixels = np.rint(pixels * self.scale)
        return pixels.astype(self.dtype, copy=False)

    def close(self) -> None:
        """See `Reader`."""
        self.image.close()


@contextlib.contextmanager
def _libtiff_silent() -> Iterator[None]:
    """While entered, nothing reaches standard error: libtiff writes there, in C, what its errors say too."""
    try:
        kept = os.dup(2)
    except OSError:  # this process has none
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _plain(image: Image.Image) -> Image.Image:
    """The picture in a mode of `_CHANNELS`: palettes, bits, and colours of other kinds resolved."""
    mode = image.mode
    if mode in ("1", "L", "P", "RGB") and "transparency" in image.info:
        return image.convert("RGBA")
    if mode == "P" and image.palette is not None and image.palette.mode == "RGBA":
        return image.convert("RGBA")
    if mode == "1":
        return image.convert("L")
    return image if mode in _CHANNELS else image.convert(_ALPHA.get(mode, "RGB"))


def orientation_of(image: Image.Image) -> int:
    """The orientation that the file tells, 1 where it is upright or what it tells cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # any error of damaged metadata, of a picture that may be whole
        return 1


def _bits(image: Image.Image) -> int:
    """Bits a value of a TIFF file; 0 elsewhere."""
    try:
        return int(image.tag_v2.get(_BITS, (0,))[0])  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError, IndexError):
        return 0
