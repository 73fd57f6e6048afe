"""TIFF files: the tiles or strips that a slice needs, one at a time."""

import pathlib
from collections import OrderedDict
from typing import Any

import numpy as np

from linsight.errors import ImageError, MissingExtraError
from linsight.runtime.memory import free_memory, in_words

KEPT = 2**28  # bytes of decoded segments: strips are as wide as the image, and all tiles of a row need them again


class Tiff:
    """The first picture of a file, at its full resolution.

    Raises:
        MissingExtraError: tifffile, or what decodes this compression, is not installed.
        ImageError: a stack of pictures, or pixels that are no grey or colour values.
    """

    def __init__(self, path: pathlib.Path) -> None:
        try:
            import tifffile
        except ImportError as error:
            raise MissingExtraError("tifffile", "slides", f"'{path}', a TIFF file,") from error
        self.file = tifffile.TiffFile(path)
        try:
            self._open(path)
        except BaseException:
            self.file.close()
            raise

    def _open(self, path: pathlib.Path) -> None:
        page: Any = self.file.pages.first
        self.page, colour = page, getattr(page.photometric, "name", str(page.photometric))
        turned = page.tags.get(274)  # orientation
        if turned is not None and turned.value != 1:
            raise ImageError(f"'{path}' is stored turned or mirrored (orientation {turned.value:d}): save it upright")
        axes, bits = self.file.series[0].axes, page.bitspersample
        self.palette, self.inverted = page.colormap if colour == "PALETTE" else None, colour == "MINISWHITE"
        if axes not in ("YX", "YXS", "SYX"):
            raise ImageError(f"'{path}' is a stack of pictures (axes {axes}): save one of them as a file of its own")
        if bits not in (8, 16, 32, 64) or page.dtype is None or page.dtype.kind not in "uif":
            raise ImageError(f"'{path}' has {bits} bits a sample: save it with 8 or 16")
        jpeg = colour == "YCBCR" and page.compression in (6, 7, 33007)
        if colour not in ("MINISBLACK", "MINISWHITE", "RGB", "PALETTE") and not jpeg:
            raise ImageError(f"'{path}' has colours that are not read here ({colour}): save it as RGB")
        self.planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self.shape = (page.imagelength, page.imagewidth, page.samplesperpixel if self.palette is None else 3)
        strip = (min(page.rowsperstrip, page.imagelength), page.imagewidth)
        self.segment = (page.tilelength, page.tilewidth) if page.is_tiled else strip
        self.mapped: Any = None
        self.kept: OrderedDict[int, Any] = OrderedDict()
        if page.is_memmappable:
            dtype, shape = page.dtype.newbyteorder(self.file.byteorder), page.shape
            self.mapped = np.memmap(path, dtype, "r", page.dataoffsets[0], shape)
            self.mapped = np.moveaxis(self.mapped, 0, -1) if self.planes > 1 else self.mapped
            return
        need = self.segment[0] * self.segment[1] * (page.samplesperpixel // self.planes) * page.dtype.itemsize
        if need > (free := free_memory()).bytes:
            raise ImageError(
                f"'{path}' has segments of {in_words(need)}, each read whole, and {free} are free: save it in tiles"
            )
        self.most = max(1, KEPT // need)
        try:
            self._decoded(0)  # a file that cannot be decoded at all is refused before any work
        except ValueError as error:
            if "imagecodecs" in str(error):
                name = getattr(page.compression, "name", str(page.compression))
                raise MissingExtraError("imagecodecs", "slides", f"'{path}', a TIFF file with {name},") from error
            raise

    def read(self, rows: slice, columns: slice) -> Any:
        """Pixels of a rectangle, `(h, w)` or `(h, w, samples)`."""
        pixels = self._segments(rows, columns) if self.mapped is None else self.mapped[rows, columns]
        if self.palette is not None:
            return np.moveaxis(self.palette[:, pixels[..., 0] if pixels.ndim == 3 else pixels], 0, -1)
        if self.inverted:
            return (1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max) - pixels
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
