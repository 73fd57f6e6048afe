"""Readers of one kind of files: the contract, pixels in an array, whole slides, and a picture that is turned."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from linsight.errors import ImageError, MissingExtraError

from .levels import choose, levels_of

# What is told of a picture that is not read as it is.
FRAMES = "several frames, of which the first is read"
EXTRA = "channels beyond those of the model, which are left out"
DARK = "16 bits of which 12 at most are in use, which leaves all nearly black: stretch the values before"


class Reader(Protocol):
    """A reader of one kind of files.

    shape: (height, width, channels a pixel).
    dtype: that of the pixels; its largest value is white, but for floats and wide whole numbers.
    alpha: what the last channel is: "straight" or "premultiplied" opacity, or "" where it is a channel like others.
    notes: what is told of the file, as `FRAMES`.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    alpha: str
    notes: tuple[str, ...]

    def read(self, rows: slice, columns: slice) -> Any:
        """Pixels of a rectangle, `(h, w)` or `(h, w, channels)`."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Wanted(NamedTuple):
    """How a file is to be read.

    channels: as many as the model takes.
    level, mpp: which level, by its number or by microns a pixel; the full size by neither.
    most: pixels of the largest picture that is read; None: as memory allows.
    draft: JPEGs may be decoded at a fraction of their size, whose shorter side has so many pixels or more; 0: whole.
    """

    channels: int
    level: int | None = None
    mpp: float | None = None
    most: float | None = None
    draft: int = 0

    def check(self, height: int, width: int, name: str) -> None:
        """Raise an ImageError for a picture without pixels, or of more than are read whole."""
        if min(height, width) < 1:
            raise ImageError(f"{name}: has no pixels ({width} x {height})")
        if self.most is not None and height * width > self.most:
            raise ImageError(
                f"{name}: {width} x {height} are {height * width / 1e6:.0f} megapixels, and pictures of more than "
                f"{self.most / 1e6:.3g} are not read whole: use predict --stream (linsight.stream), or make it smaller"
            )

    def one_level(self, height: int, width: int, name: str) -> None:
        """Raise a LinsightError where another level is asked for than the only one that there is."""
        choose(levels_of([(height, width)], None), self.level, self.mpp, name)


class Plain:
    """Pixels that are in an array already, `(h, w)`, `(h, w, channels)`, or `(channels, h, w)` of the model's."""

    alpha = ""
    notes: tuple[str, ...] = ()

    def __init__(self, data: Any, wanted: Wanted, name: str) -> None:
        if data.ndim not in (2, 3):
            raise ImageError(f"{name}: an array of shape {data.shape} is no picture: give (height, width, channels)")
        if data.ndim == 3 and data.shape[2] > 4 and data.shape[2] != wanted.channels == data.shape[0]:
            data = np.moveaxis(data, 0, -1)
        self.data, self.dtype = data, data.dtype
        height, width, channels = (*data.shape, 1)[:3]
        self.shape = (height, width, channels)
        wanted.check(height, width, name)
        wanted.one_level(height, width, name)

    def read(self, rows: slice, columns: slice) -> Any:
        """See `Reader`."""
        return self.data[rows, columns]

    def close(self) -> None:
        """See `Reader`."""
        del self.data


class Slide:
    """A whole slide, through OpenSlide; what was not scanned has the slide's background."""

    alpha = ""
    notes: tuple[str, ...] = ()
    dtype = np.dtype(np.uint8)

    def __init__(self, path: str, wanted: Wanted, name: str) -> None:
        try:
            import openslide
        except (ImportError, OSError) as error:  # the latter: the package without its library
            raise MissingExtraError("openslide-python", "slides", f"{name}, a slide,") from error
        self.slide = openslide.OpenSlide(path)
        try:
            sizes = [(height, width) for width, height in self.slide.level_dimensions]
            try:
                mpp = float(self.slide.properties.get("openslide.mpp-x", "")) or None
            except ValueError:
                mpp = None
            self.level = choose(levels_of(sizes, mpp), wanted.level, wanted.mpp, name)
            self.shape = (*sizes[self.level], 3)
            wanted.check(*sizes[self.level], name)
        except BaseException:
            self.slide.close()
            raise
        self.background = f"#{self.slide.properties.get('openslide.background-color', 'ffffff')}"

    def read(self, rows: slice, columns: slice) -> Any:
        """See `Reader`."""
        size = (columns.stop - columns.start, rows.stop - rows.start)
        scale = self.slide.level_downsamples[self.level]  # places are told in pixels of the full size
        place = (round(columns.start * scale), round(rows.start * scale))
        region = self.slide.read_region(place, self.level, size)
        whole = Image.new("RGB", size, self.background)
        whole.paste(region, mask=region.getchannel("A"))
        return np.asarray(whole)

    def close(self) -> None:
        """See `Reader`."""
        self.slide.close()


# By the orientation that a file tells: whether rows and columns change places, then which of them run backwards.
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


SIDEWAYS = tuple(orientation for orientation, (swapped, *_) in TURNS.items() if swapped)


def upright(pixels: Any, orientation: int) -> Any:
    """Pixels `(h, w, ...)` that are stored by an orientation, upright."""
    swapped, up, back = TURNS.get(orientation, (False, False, False))
    pixels = pixels.swapaxes(0, 1) if swapped else pixels
    return pixels[:: -1 if up else 1, :: -1 if back else 1]


class Turned:
    """A picture that is stored turned or mirrored, upright."""

    def __init__(self, reader: Reader, orientation: int) -> None:
        self.reader = reader
        self.swapped, self.up, self.back = TURNS[orientation]
        height, width, channels = reader.shape
        self.shape = (width, height, channels) if self.swapped else reader.shape
        self.dtype, self.alpha, self.notes = reader.dtype, reader.alpha, reader.notes

    def read(self, rows: slice, columns: slice) -> Any:
        """See `Reader`."""
        height, width, _ = self.shape
        if self.up:
            rows = slice(height - rows.stop, height - rows.start)
        if self.back:
            columns = slice(width - columns.stop, width - columns.start)
        pixels = self.reader.read(columns, rows) if self.swapped else self.reader.read(rows, columns)
        pixels = pixels.swapaxes(0, 1) if self.swapped else pixels
        return pixels[:: -1 if self.up else 1, :: -1 if self.back else 1]

    def close(self) -> None:
        """See `Reader`."""
        self.reader.close()
