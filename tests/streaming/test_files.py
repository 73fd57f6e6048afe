"""Image files of every kind that is read, against their pixels; and those that are not, with one line."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import linsight
from linsight.data import opened
from linsight.errors import LinsightError
from linsight.streaming.source import Source

from .hosts import PLAIN, close, small, whole

SIDES = (45, 70)
tifffile = pytest.importorskip("tifffile")


def photo(channels=3, dtype=np.uint8):
    rng = np.random.default_rng(0)
    return rng.integers(0, np.iinfo(dtype).max, (*SIDES, channels), dtype=dtype)


def grey_of(pixels):
    return np.asarray(Image.fromarray(pixels[..., :3]).convert("L"))[..., None]


def on_white(pixels):
    colours, alpha = pixels[..., :-1].astype(int), pixels[..., -1:].astype(int)
    return np.floor((colours * alpha + 255 * (255 - alpha)) / 255 + 0.5).astype(np.uint8)


def same(path, expected, channels=3):
    """In pieces that begin and end anywhere."""
    with opened(path, channels) as (picture, _):
        assert picture.shape == expected.shape
        for rows in (slice(0, 17), slice(17, 45)):
            for columns in (slice(0, 33), slice(33, 34), slice(34, 70)):
                np.testing.assert_array_equal(picture[rows, columns], expected[rows, columns])


def one_line(path, *words, channels=3):
    with pytest.raises(LinsightError) as caught, opened(path, channels) as (picture, name):
        Source(picture, (0.0,) * channels, (1.0,) * channels, name).read((0, 45), (0, 70))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (*words, str(path))), message


TIFFS = {
    "plain": {},
    "strips": {"rowsperstrip": 7},
    "one strip, compressed": {"compression": "zlib"},
    "strips, compressed": {"rowsperstrip": 7, "compression": "zlib", "predictor": True},
    "tiles": {"tile": (16, 32)},
    "tiles, compressed": {"tile": (32, 16), "compression": "zlib"},
    "planes": {"planarconfig": "separate"},
    "planes of tiles": {"planarconfig": "separate", "tile": (16, 16), "compression": "zlib"},
    "big endian": {"byteorder": ">"},
}


@pytest.mark.parametrize("form", TIFFS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_files(form, dtype, tmp_path):
    options, pixels, path = dict(TIFFS[form]), photo(dtype=dtype), tmp_path / "a.tif"
    order = options.pop("byteorder", None)
    planes = options.get("planarconfig")
    tifffile.imwrite(
        path, np.moveaxis(pixels, -1, 0) if planes else pixels, photometric="rgb", byteorder=order, **options
    )
    same(path, pixels)


def test_tiff_files_of_other_colours(tmp_path):
    path, rgba, grey = tmp_path / "a.tiff", photo(4), photo(1)
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(16, 16), compression="zlib")
    same(path, on_white(rgba))
    same(path, grey_of(on_white(rgba)), channels=1)
    for colour, expected in (("minisblack", grey), ("miniswhite", 255 - grey)):
        tifffile.imwrite(path, grey[..., 0], photometric=colour)
        same(path, expected, channels=1)
        same(path, np.repeat(expected, 3, axis=2))
    colours = np.random.default_rng(1).integers(0, 65535, (3, 256), dtype=np.uint16)
    tifffile.imwrite(path, grey[..., 0], photometric="palette", colormap=colours, tile=(16, 16))
    same(path, np.moveaxis(colours[:, grey[..., 0]] >> 8, 0, -1).astype(np.uint8))


def test_only_the_segments_that_are_asked_for_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, photo(), photometric="rgb", tile=(16, 16), compression="zlib")
    with opened(path, 3) as (picture, _):
        read, file = [], picture.reader.file.filehandle
        monkeypatch.setattr(
            picture.reader.file,
            "_fh",
            types.SimpleNamespace(
                seek=file.seek, read=lambda count: read.append(count) or file.read(count), close=file.close
            ),
        )
        picture[16:32, 16:33]
        assert len(read) == 2
        picture[20:32, 16:33]
        assert len(read) == 2  # they are kept


def test_segments_are_kept_while_there_is_place(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    monkeypatch.setattr("linsight.data.tiff.KEPT", 2 * 16 * 16 * 3 + 1)
    tifffile.imwrite(path, photo(), photometric="rgb", tile=(16, 16), compression="zlib")
    with opened(path, 3) as (picture, _):
        picture[0:45, 0:70]
        assert list(picture.reader.kept) == [13, 14]
    assert not picture.reader.kept
    monkeypatch.setattr("linsight.runtime.memory.SOURCES", {"RLIMIT_AS": lambda root: [16 * 16 * 3 - 1]})
    one_line(path, "RLIMIT_AS", "save it in tiles")


def test_tiff_files_that_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, photo(), photometric="rgb", tile=(16, 16), compression="zlib")
    whole_file = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.dataoffsets[3]
    path.write_bytes(whole_file[:offset] + b"\0" * 40 + whole_file[offset + 40 :])
    one_line(path, "rows 0 to 45")
    tifffile.imwrite(path, photo(), photometric="rgb")
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[:-50])
    one_line(path, "cannot be read")
    tifffile.imwrite(path, photo(), photometric="rgb", rowsperstrip=40, compression="zlib")
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[:-50])
    one_line(path, "rows 0 to 45", "ends before")
    path.write_bytes(b"nothing")
    one_line(path, "not an image")
    tifffile.imwrite(path, photo(6), photometric="minisblack", planarconfig="contig")
    one_line(path, "6 channels")
    tifffile.imwrite(path, photo(3, np.uint16), photometric="logluv")
    one_line(path, "colours", "LOGLUV")
    tifffile.imwrite(path, np.stack([photo()[..., 0]] * 3), photometric="minisblack", metadata={"axes": "CYX"})
    one_line(path, "pictures for channels", "CYX")
    tifffile.imwrite(path, photo().astype(np.float32), photometric="rgb")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    one_line(path, "tifffile", "pip install -e '.[slides]'")


def test_tiff_files_that_only_pillow_decodes(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    Image.fromarray(photo()).save(path, compression="tiff_lzw")
    same(path, photo())
    bits = photo(1) > 99
    tifffile.imwrite(path, bits[..., 0], photometric="minisblack")
    same(path, bits.astype(np.uint8) * 255, channels=1)
    Image.fromarray(photo(4), "CMYK").save(path)
    same(path, np.asarray(Image.open(path).convert("RGB")))
    tifffile.imwrite(path, photo(), photometric="rgb")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    same(path, photo())


@pytest.mark.parametrize("kind", ["png", "bmp", "ppm"])
def test_pictures_that_pillow_opens(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    Image.fromarray(photo()).save(path)
    same(path, photo())
    same(path, grey_of(photo()), channels=1)


def test_pictures_of_other_colours(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo(4)).save(path)
    same(path, on_white(photo(4)))
    Image.fromarray(photo(2), "LA").save(path)
    same(path, on_white(photo(2)), channels=1)
    deep = photo(1, np.uint16)
    Image.fromarray(deep[..., 0]).save(path)
    same(path, np.repeat(deep, 3, axis=2))
    Image.fromarray(photo(1)[..., 0] > 99).save(path)
    same(path, (photo(1) > 99).astype(np.uint8) * 255, channels=1)
    Image.fromarray(photo()).quantize(16).save(path)
    same(path, np.asarray(Image.open(path).convert("RGB")))
    path = tmp_path / "a.jpg"
    Image.fromarray(photo(4), "CMYK").save(path)
    same(path, np.asarray(Image.open(path).convert("RGB")))


def test_pictures_that_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(photo()).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    one_line(path, "cannot be read")
    path.write_text("no picture")
    one_line(path, "not an image")
    one_line(tmp_path, "folder")
    one_line(tmp_path / "b.png", "no such image")
    Image.fromarray(photo()).save(path)
    monkeypatch.setattr("linsight.runtime.memory.SOURCES", {"RLIMIT_AS": lambda root: [12_599]})
    one_line(path, "needs 0.0 MB", "RLIMIT_AS", "tiled TIFF")
    monkeypatch.setattr("linsight.runtime.memory.SOURCES", {"RLIMIT_AS": lambda root: [12_600]})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    same(path, photo())


def test_numpy_files(tmp_path):
    path, pixels = tmp_path / "a.npy", photo()
    for stored in (pixels, pixels.astype(">u2"), np.asfortranarray(pixels)):
        np.save(path, stored)
        same(path, pixels)
        with opened(path, 3) as (picture, _):
            assert isinstance(picture[0:4, 0:4].base, np.memmap)
    np.save(path, pixels[..., 0])
    same(path, np.repeat(pixels[..., :1], 3, axis=2))
    np.save(path, photo(4))
    same(path, photo(4)[..., :3])
    path.write_bytes(path.read_bytes()[:-1])
    one_line(path, "cannot be read")
    for bad in (np.array([[{}]]), np.zeros((4, 45, 70)), np.zeros(SIDES, complex), np.zeros(3)):
        np.save(path, bad)
        one_line(path)
    with open(path, "wb") as file:
        np.savez(file, pixels)
    one_line(path, "not an image")


class _Slide:
    """As of openslide, with an alpha channel."""

    properties = {"openslide.background-color": "0A141E"}  # noqa: RUF012
    level_dimensions = (SIDES[::-1],)
    level_downsamples = (1.0,)

    def __init__(self, name):
        if name.endswith("bad.svs"):
            raise RuntimeError("Not a file\nthat OpenSlide can recognize")
        self.pixels, self.closed = Image.fromarray(photo(4)), False

    def read_region(self, place, level, size):
        assert level == 0
        return self.pixels.crop((*place, place[0] + size[0], place[1] + size[1]))

    def close(self):
        self.closed = True


def test_whole_slides(tmp_path, monkeypatch):
    for name in ("a.svs", "bad.svs"):
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "openslide", types.SimpleNamespace(OpenSlide=_Slide))
    background = Image.new("RGBA", SIDES[::-1], (10, 20, 30, 255))
    expected = np.asarray(Image.alpha_composite(background, Image.fromarray(photo(4))).convert("RGB")).astype(int)
    with opened(tmp_path / "a.svs", 3) as (picture, _):
        assert picture.shape == (*SIDES, 3)
        found = picture[7:30, 5:60]
        assert np.abs(found - expected[7:30, 5:60]).max() <= 1
    assert picture.reader.slide.closed
    one_line(tmp_path / "bad.svs", "Not a file that OpenSlide can recognize")
    monkeypatch.setitem(sys.modules, "openslide", None)
    one_line(tmp_path / "a.svs", "pip install -e '.[slides]'")


def test_slides_through_the_real_library(tmp_path):
    pytest.importorskip("openslide")
    pytest.importorskip("imagecodecs")
    path = tmp_path / "a.svs"  # a generic tiled TIFF, to OpenSlide
    smooth = (np.indices((*SIDES, 3)).sum(axis=0) * 2).astype(np.uint8)
    tifffile.imwrite(path, smooth, photometric="rgb", tile=(16, 16), compression="jpeg")
    for name in ("a.svs", "a.tif"):
        with opened(path.rename(tmp_path / name), 3) as (picture, _):
            found = picture[5:45, 9:70].astype(int)
            assert picture.shape == (*SIDES, 3) and np.abs(found - smooth[5:45, 9:70]).mean() < 4
        path = tmp_path / name


def test_a_path_is_streamed_as_its_pixels(tmp_path):
    model, path = small("vit_tiny", "inline", cpe=True), tmp_path / "a.tif"
    tifffile.imwrite(path, photo(), photometric="rgb", tile=(16, 16), compression="zlib")
    pixels = torch.from_numpy(photo()).permute(2, 0, 1) / 255
    close(linsight.stream(model, path, tile=24, **PLAIN), whole(model, pixels)[2])
    assert tifffile.TiffFile(path).close() is None
