"""TIFF files: the tiles or strips that a slice needs, one at a time."""

import contextlib
import math
import os
import re
from collections import OrderedDict
from typing import Any

import numpy as np

from linsight.errors import ImageError, MissingExtraError
from linsight.runtime.memory import free_memory, in_words

from .levels import choose, levels_of
from .readers import FRAMES, Wanted

KEPT = 2**28  # bytes of decoded segments: strips are as wide as the image, and all tiles of a row need them again


_MICRONS = {2: 25400.0, 3: 10000.0}  # of an inch and of a centimetre, the units of a resolution
_ALPHA = {1: "premultiplied", 2: "straight"}
_ORIENTATION, _NODATA = 274, 42113
_JPEG = (6, 7, 33007)  # compressions


class OtherKind(ImageError):
    """A TIFF file of a kind that is not read in parts; Pillow may read it whole."""


class Tiff:
    """The first picture of a file, at its full size or at another level of its pyramid.

    orientation: how it is stored, 1 for upright.

    Raises:
        MissingExtraError: tifffile, or what decodes this compression, is not installed.
        OtherKind: bits or colours that are not read here.
        ImageError: channels that are pictures of their own, or segments that do not fit.
        LinsightError: no such level.
    """

    def __init__(self, source: Any, wanted: Wanted, name: str) -> None:
        try:
            import tifffile
        except ImportError as error:
            raise MissingExtraError("tifffile", "slides", f"{name}, a TIFF file,") from error
        self.file = tifffile.TiffFile(source)
        try:
            self._choose(wanted, name)
            self._open(source, name)
            wanted.check(self.shape[0], self.shape[1], name)
        except BaseException:
            self.file.close()
            raise

    def _choose(self, wanted: Wanted, name: str) -> None:
        """The page of the level that is asked for."""
        first: Any = self.file.pages.first
        series = self.file.series[0]
        axes = series.axes
        if "C" in axes or getattr(first, "imagedepth", 1) > 1:
            raise ImageError(f"{name}: has pictures for channels or depths (axes {axes}): save it as one picture")
        others = len(self.file.series) > 1 and series.kind in ("generic", "shaped", "uniform")
        self.notes: tuple[str, ...] = (FRAMES,) if axes not in ("YX", "YXS", "SYX") or others else ()
        pages = [level.keyframe for level in series.levels] if len(series.levels) > 1 else [first]
        sizes = [(page.imagelength, page.imagewidth) for page in pages]
        number = choose(levels_of(sizes, self._microns(first)), wanted.level, wanted.mpp, name)
        self.page = pages[number]
        turned = first.tags.get(_ORIENTATION)
        self.orientation = turned.value if turned is not None and isinstance(turned.value, int) else 1

    def _microns(self, page: Any) -> float | None:
        """Microns a pixel, as slides, OME files and the tags of a resolution say them."""
        about = f"{page.description or ''} {self.file.ome_metadata or ''}"
        unit = re.search(r'PhysicalSizeXUnit="([^"]*)"', about)
        if unit is None or unit[1] in ("µm", "um"):
            for pattern in (r"\bMPP\s*=\s*([\d.]+)", r'PhysicalSizeX="([\d.eE+-]+)"'):
                if found := re.search(pattern, about):
                    with contextlib.suppress(ValueError):
                        return float(found[1]) or None
        with contextlib.suppress(Exception):  # any damage of these tags, and their absence
            above, below = page.tags[282].value
            return _MICRONS[int(page.tags[296].value)] * below / above or None
        return None

    def _open(self, source: Any, name: str) -> None:
        page = self.page
        colour = getattr(page.photometric, "name", str(page.photometric))
        bits = page.bitspersample
        self.palette, self.inverted = page.colormap if colour == "PALETTE" else None, colour == "MINISWHITE"
        if bits not in (8, 16, 32, 64) or page.dtype is None or page.dtype.kind not in "uif":
            raise OtherKind(f"{name}: has {bits} bits a sample: save it with 8 or 16")
        jpeg = colour == "YCBCR" and page.compression in _JPEG
        if colour not in ("MINISBLACK", "MINISWHITE", "RGB", "PALETTE") and not jpeg:
            raise OtherKind(f"{name}: has colours that are not read here ({colour}): save it as RGB")
        self.planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self.shape = (page.imagelength, page.imagewidth, page.samplesperpixel if self.palette is None else 3)
        if self.palette is not None:  # of 16 bits, which are 8, once shifted and once repeated
            self.palette = (self.palette >> 8).astype(np.uint8)
        self.dtype = page.dtype if self.palette is None else self.palette.dtype
        extra = page.extrasamples
        self.alpha = _ALPHA.get(int(extra[0]), "") if len(extra) == 1 and self.shape[2] in (2, 4) else ""
        self.nodata = page.nodata if page.dtype.kind == "f" and _NODATA in page.tags else None
        strip = (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        self.segment = (page.tilelength, page.tilewidth) if page.is_tiled else strip
        parts = self.planes * math.prod(
            -(-side // max(1, own)) for side, own in zip(self.shape[:2], self.segment, strict=True)
        )
        if len(page.dataoffsets) != parts:
            raise ImageError(f"{name}: damaged: {len(page.dataoffsets)} segments, and its size has {parts}")
        self.mapped: Any = None
        self.kept: OrderedDict[int, Any] = OrderedDict()
        if page.is_memmappable and isinstance(source, str | os.PathLike):
            dtype, shape = page.dtype.newbyteorder(self.file.byteorder), page.shape
            self.mapped = np.memmap(source, dtype, "r", page.dataoffsets[0], shape)
            self.mapped = np.moveaxis(self.mapped, 0, -1) if self.planes > 1 else self.mapped
            return
        need = self.segment[0] * self.segment[1] * (page.samplesperpixel // self.planes) * page.dtype.itemsize
        if need > (free := free_memory()).bytes:
            raise ImageError(
                f"{name}: has segments of {in_words(need)}, each read whole, and {free} are free: save it in tiles"
            )
        self.most = max(1, KEPT // max(1, need))
        try:
            self._decoded(0)  # a file that cannot be decoded at all is refused before any work
        except ValueError as error:
            if "imagecodecs" in str(error):
                compression = getattr(page.compression, "name", str(page.compression))
                raise MissingExtraError("imagecodecs", "slides", f"{name}, a TIFF file with {compression},") from error
            raise

    def read(self, rows: slice, columns: slice) -> Any:
        """Pixels of a rectangle, `(h, w)` or `(h, w, samples)`."""
        pixels = self._segments(rows, columns) if self.mapped is None else self.mapped[rows, columns]
        if self.palette is not None:
            return np.moveaxis(self.palette[:, pixels[..., 0] if pixels.ndim == 3 else pixels], 0, -1)
        if self.inverted:
            return (1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max) - pixels
        if self.nodata is not None:
            return np.where(pixels == self.nodata, np.nan, pixels)
        return pixels

    def _segments(self, rows: slice, columns: slice) -> Any:
        (height, width), page = self.segment, self.page
        down, across = -(-page.imagelength // height), -(-page.imagewidth // width)
        size = (rows.stop - rows.start, columns.stop - columns.start)
        out = np.zeros((*size, page.samplesperpixel), page.dtype)
        for plane in range(self.planes):
            target = out[..., plane : plane + 1] if self.planes > 1 else out
            for i in range(rows.start // height, -(-rows.stop // height)):
                for j in range(columns.start // width, -(-columns.stop // width)):
                    part = self._decoded((plane * down + i) * across + j)
                    top, left = i * height, j * width
                    first, last = max(top, rows.start), min(top + part.shape[0], rows.stop)
                    begin, end = max(left, columns.start), min(left + part.shape[1], columns.stop)
                    inner = part[first - top : last - top, begin - left : end - left]
                    target[first - rows.start : last - rows.start, begin - columns.start : end - columns.start] = inner
        return out

    def _decoded(self, index: int) -> Any:
        """Segment `index`, `(h, w, samples)`."""
        if index in self.kept:
            self.kept.move_to_end(index)
            return self.kept[index]
        page, file = self.page, self.file.filehandle
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        data: bytes | None = None  # a segment that the file leaves out has one value
        if offset and count:
            file.seek(offset)
            data = file.read(count)
            if len(data) < count:
                raise ImageError("the file ends before its pixels do")
            if page.compression in _JPEG and (size := _jpeg_size(data)) and math.prod(size) > math.prod(self.segment):
                raise ImageError(f"damaged: a segment that says it has {size[1]} x {size[0]} pixels")
        part, _, shape = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        part = np.full(shape, page.nodata, page.dtype)[0] if part is None else part[0]
        self.kept[index] = part
        if len(self.kept) > self.most:
            self.kept.popitem(last=False)
        return part

    def close(self) -> None:
        """Let go of the file."""
        self.mapped = None
        self.kept.clear()
        self.file.close()


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG stream says it has; a decoder would take the memory for them at their word."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        kind = data[place + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # tables, and what is reserved
            return int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None
