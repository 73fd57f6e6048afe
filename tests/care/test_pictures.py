"""One reader of pictures: depth, colour, orientation, alpha, levels, what is refused, and the same at every door."""

import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import linsight
from linsight.data import decode, extensions, left_out, opened
from linsight.data.readers import DARK, EXTRA, FRAMES
from linsight.errors import ImageError, LinsightError
from linsight.streaming.source import Source

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import mutated_pictures

tifffile = pytest.importorskip("tifffile")
SIDES = (6, 9)


def noise(*shape, dtype=np.uint8, top=None):
    return np.random.default_rng(0).integers(0, top or np.iinfo(dtype).max, shape, dtype=dtype)


def seen(path, mode="RGB", **more):
    """What training sees, the same as a path and as bytes, and what a stream sees, to half a level of 8 bits."""
    whole, notes = decode(path, mode, "it", **more)
    pixels = np.asarray(whole).reshape(whole.height, whole.width, -1)
    again = decode(path.read_bytes(), mode, "it", **more)
    assert np.array_equal(np.asarray(again.image), np.asarray(whole)) and again.notes == notes
    channels = pixels.shape[2]
    with opened(path, channels, **more) as (picture, name):
        assert picture.notes == tuple(note for note in notes if note != DARK)  # a stream has not seen all values yet
        source = Source(picture, (0.0,) * channels, (1.0,) * channels, name)
        half = (source.size[0] + 1) // 2
        parts = [source.read(rows, (0, source.size[1])) for rows in ((0, half), (half, source.size[0]))]
    stream = torch.cat([part for part in parts if part.numel()], 2)[0].permute(1, 2, 0).numpy() * 255
    assert stream.shape == pixels.shape and np.abs(stream - pixels).max() < 0.51
    return pixels, notes


def refused(call, *words):
    with pytest.raises(LinsightError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def refused_everywhere(path, *words, channels=3):
    refused(lambda: decode(path, {1: "L", 3: "RGB"}[channels], str(path)), *words, str(path))
    refused(lambda: opened(path, channels).__enter__(), *words, str(path))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm", ".jp2", ".npy"])
def test_sixteen_bits_are_scaled(suffix, tmp_path):
    path, deep = tmp_path / f"a{suffix}", noise(*SIDES, dtype=np.uint16)
    if suffix == ".npy":
        np.save(path, deep)
    else:
        Image.fromarray(deep).save(path)
    grey, _ = seen(path, "L")
    assert np.array_equal(grey[..., 0], np.floor(deep / 257 + 0.5))
    assert np.array_equal(seen(path)[0], np.repeat(grey, 3, 2))


OUT_OF_RANGE = (np.full(SIDES, -0.1), np.full(SIDES, 300.0), np.linspace(-0.05, 1.05, 54).reshape(SIDES))


def test_every_depth_of_a_tiff_file(tmp_path):
    path, byte = tmp_path / "a.tif", noise(*SIDES, 3)
    byte[0, 0, 0] = 255
    for dtype, scale in (
        (np.uint16, 257),
        (np.uint32, 257),
        (np.int16, 1),
        (np.int32, 1),
        (np.int32, 257),
        (np.float16, 1 / 255),
        (np.float32, 1 / 255),
        (np.float64, 1),
    ):
        tifffile.imwrite(path, (byte * np.float64(scale)).astype(dtype), photometric="rgb")
        assert np.array_equal(seen(path)[0], byte), (dtype, scale)
    for bad in (np.full(SIDES, -1, np.int16), np.full(SIDES, 70000), *OUT_OF_RANGE):
        tifffile.imwrite(path, bad, photometric="minisblack")
        refused_everywhere(path, "values of", "0 to 255", "scale them", channels=1)
    tifffile.imwrite(path, noise(*SIDES, dtype=np.int8), photometric="minisblack")
    refused_everywhere(path, "int8", "no brightness", channels=1)


def test_twelve_bits_of_a_tiff_file_are_scaled(tmp_path):
    """In the packed form that cameras write, which tifffile needs another package for."""
    values, path = np.array([[0, 4095], [2048, 16]]), tmp_path / "a.tif"
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.tolist())
    tags = ((256, 4, 2), (257, 4, 2), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, 2))
    tags += ((279, 4, len(packed)),)
    table = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, kind, value in tags
    )
    head = b"II*\0" + (8 + len(packed)).to_bytes(4, "little")
    path.write_bytes(head + packed + len(tags).to_bytes(2, "little") + table + bytes(4))
    assert np.abs(seen(path, "L")[0][..., 0] - values / 4095 * 255).max() <= 0.51


TURNED = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: np.rot90,
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".lzw.tif", ".jpg"])
def test_pictures_are_upright(suffix, orientation, tmp_path):
    """The value of the tag says how the upright picture is brought to the stored one, undone by the reader."""
    path, upright = tmp_path / f"a{suffix}", np.repeat(np.repeat(noise(2, 3, 3), 8, 0), 8, 1)
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](upright)))
    exif = Image.Exif()
    exif[274] = orientation
    if suffix == ".tif":
        tifffile.imwrite(path, stored, photometric="rgb", extratags=[(274, "H", 1, orientation, True)], tile=(16, 16))
    elif suffix == ".lzw.tif":
        stored.save(path, tiffinfo={274: orientation}, compression="tiff_lzw")
    else:
        stored.save(
            path, exif=exif, **({"lossless": True} if suffix == ".webp" else {"quality": 100, "subsampling": 0})
        )
    assert np.abs(seen(path)[0].astype(int) - upright).max() <= (3 if suffix == ".jpg" else 0)


def test_a_damaged_orientation_is_none(tmp_path):
    path = tmp_path / "a.png"
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM", b"nothing"):
        Image.fromarray(noise(*SIDES, 3)).save(path, exif=exif)
        assert np.array_equal(seen(path)[0], noise(*SIDES, 3))


def test_transparent_colours_lie_on_white(tmp_path):
    path, rgba = tmp_path / "a.png", noise(*SIDES, 4)
    rgba[0, :, 3] = 0
    rgba[1, :, 3] = 255
    Image.fromarray(rgba).save(path)
    found, _ = seen(path)
    assert (found[0] == 255).all() and np.array_equal(found[1], rgba[1, :, :3])
    share = rgba[..., 3:] / 255
    assert np.abs(found - (rgba[..., :3] * share + 255 * (1 - share))).max() <= 0.5
    assert (seen(path, "L")[0][0] == 255).all()
    assert np.array_equal(seen(path, "CMYK")[0], rgba)  # a model of four channels takes them as they are
    floats = tmp_path / "floats.tif"
    tifffile.imwrite(floats, (rgba / 255).astype(np.float32), photometric="rgb", extrasamples=["unassalpha"])
    assert np.abs(seen(floats)[0] - (rgba[..., :3] * share + 255 * (1 - share))).max() <= 0.51
    palette = Image.fromarray(noise(*SIDES, 3)).quantize(8)
    palette.save(path, transparency=bytes(8))
    assert (seen(path)[0] == 255).all()
    Image.fromarray(np.full((*SIDES, 3), 7, np.uint8)).save(path, transparency=(7, 7, 7))
    assert (seen(path)[0] == 255).all()
    tiff = tmp_path / "a.tif"
    for kind, colour, white in (("assocalpha", 0, 65535), ("unassalpha", 9, 65535), ("unspecified", 9, 9)):
        pixels = np.full((*SIDES, 4), colour, np.uint16)
        pixels[..., 3] = 0
        tifffile.imwrite(tiff, pixels, photometric="rgb", extrasamples=[kind])
        found, notes = seen(tiff)
        assert (found == white // 257).all() and notes == ((EXTRA, DARK) if kind == "unspecified" else ())


def test_colours_of_other_kinds(tmp_path):
    for mode in ("CMYK", "YCbCr", "LAB", "1", "P"):
        path = tmp_path / f"{mode}.tif"
        image = Image.fromarray(noise(16, 24, 3))
        image = Image.frombytes("LAB", (24, 16), noise(16, 24, 3).tobytes()) if mode == "LAB" else image.convert(mode)
        image.save(path)
        assert np.array_equal(seen(path)[0], np.asarray(Image.open(path).convert("RGB"))), mode


def test_arrays_of_bytes_are_checked_as_files_are(monkeypatch):
    for pixels, mode in ((noise(6, 9), "L"), (noise(6, 9, 3), "RGB")):
        assert np.array_equal(np.asarray(decode(pixels, mode).image), pixels)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 26)  # decode reads twice as many
        refused(lambda pixels=pixels, mode=mode: decode(pixels, mode, "it"), "it: 9 x 6", "--stream")
        monkeypatch.undo()


def test_twelve_bits_in_sixteen_are_said(tmp_path):
    for most, notes in ((4095, (DARK,)), (4096, ()), (0, ())):
        values = np.linspace(0, most, SIDES[0] * SIDES[1]).reshape(SIDES).astype(np.uint16)
        for name in ("a.png", "a.tif"):
            Image.fromarray(values).save(tmp_path / name)
            for mode in ("L", "RGB"):
                assert seen(tmp_path / name, mode)[1] == notes, (most, name, mode)


def test_the_first_of_several_frames_is_read_and_said(tmp_path):
    frames = [Image.fromarray(np.full((*SIDES, 3), level, np.uint8)) for level in (40, 200)]
    for suffix in (".gif", ".png", ".webp", ".tif"):
        path = tmp_path / f"a{suffix}"
        frames[0].save(
            path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == ".webp" else {})
        )
        found, notes = seen(path)
        assert (found == 40).all() and notes == (FRAMES,), suffix
    tifffile.imwrite(path, np.stack([noise(*SIDES)] * 5), photometric="minisblack")
    assert seen(path, "L")[1] == (FRAMES,)


DAMAGED = (
    ".png",
    ".jpg",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".tif",
    ".jp2",
    ".ico",
    ".tga",
    ".sgi",
    ".pcx",
    ".dds",
    ".npy",
)


@pytest.mark.parametrize("suffix", DAMAGED)
def test_files_that_end_early_are_one_line(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, noise(64, 64, 3))
    else:
        Image.fromarray(noise(64, 64, 3)).save(path)
    data = path.read_bytes()
    for size in (len(data) // 2, 12, 1):
        path.write_bytes(data[:size])
        refused_everywhere(path)
    path.write_bytes(b"")
    refused_everywhere(path, "is empty")
    path.write_text("no picture")
    refused_everywhere(path, "not an image")
    path.unlink()
    path.mkdir()
    refused_everywhere(path, "is a folder")


def test_what_a_file_is_its_bytes_say(tmp_path):
    for suffix, name in ((".png", "a.jpg"), (".tif", "a.png"), (".jpg", "a.tif"), (".webp", "a.npy"), (".png", "a")):
        Image.fromarray(np.full((*SIDES, 3), 90, np.uint8)).save(tmp_path / f"b{suffix}")
        assert (seen((tmp_path / f"b{suffix}").rename(tmp_path / name))[0] == 90).all()


def test_pictures_of_any_size(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(noise(50, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1300)  # Pillow warns of those that are larger
    assert np.array_equal(seen(path, "L")[0][..., 0], noise(50, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)  # and refuses those that are twice as large
    refused(lambda: decode(path, "L", str(path)), "50 x 50", "predict --stream", str(path))
    with opened(path, 1) as (picture, _):
        assert np.array_equal(picture[0:50, 0:50][..., 0], noise(50, 50))


def holes(dtype=np.float32):
    pixels = np.random.default_rng(0).random((30, 26, 3)).astype(dtype)
    pixels[17, 20, 1] = np.nan
    pixels[18, 3, 2] = -np.inf
    return pixels


def test_pixels_that_are_no_numbers_are_named_or_filled(tmp_path):
    words = ("2 values are no numbers", "row 17, column 20, channel 1", "--fill")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, holes(), photometric="rgb")
    refused_everywhere(path, *words)
    found, _ = seen(path, fill=1.0)
    assert found[17, 20, 1] == found[18, 3, 2] == 255
    refused(lambda: decode(path, "RGB", "it", fill=2.0), "fill=2", "0 to 1")
    refused(lambda: decode(path, "RGB", "it", fill=float("nan")), "fill=nan")
    pixels = holes()
    pixels[~np.isfinite(pixels)] = -9999
    tifffile.imwrite(path, pixels, photometric="rgb")
    refused_everywhere(path, "-9999", "scale them")
    tifffile.imwrite(path, pixels, photometric="rgb", extratags=[(42113, "s", 0, "-9999", True)])  # GDAL's tag
    refused_everywhere(path, *words)
    assert np.array_equal(seen(path, fill=1.0)[0], found)
    np.save(tmp_path / "a.npy", holes())
    refused_everywhere(tmp_path / "a.npy", *words)


@pytest.fixture(scope="module")
def model():
    return linsight.create_model(
        "vit_tiny", attention="inline", depth=1, embed_dim=16, num_heads=2, num_classes=3
    ).eval()


def test_arrays_that_are_streamed(model):
    def features(image, **more):
        return linsight.stream(model, image, tile=16, output="features", **more)

    byte = noise(30, 26, 3)
    expected = features(byte)
    for same in (
        byte.astype(np.int64),
        byte.astype(np.uint16) * 257,
        byte.astype(np.int32) * 257,
        torch.from_numpy(byte).to(torch.int64),
        torch.from_numpy(byte).permute(2, 0, 1) / 255,
        (byte / 255).astype(np.float64),
    ):
        assert (features(same) - expected).abs().max() <= 1e-5 * expected.abs().max()
    bits = byte > 99
    assert torch.equal(features(bits), features(bits.astype(np.uint8) * 255))
    for bad, *words in (
        (byte.astype(np.int64) - 1, "-1"),
        (byte.astype(np.int64) * 1000, "0 to 65535"),
        (byte.astype(np.int8), "int8"),
        (byte.astype(np.float32), "0 to 1", "divide"),
        (byte.astype(np.complex64), "complex"),
        (holes(), "1 value is no number", "rows 16 to 30", "row 18, column 3, channel 2"),
        (torch.from_numpy(holes()).permute(2, 0, 1), "row 18, column 3, channel 2"),
    ):
        refused(lambda bad=bad: features(bad), *words)
    filled = holes()
    filled[~np.isfinite(filled)] = 0.5
    assert torch.equal(features(holes(), fill=0.5), features(filled))
    refused(lambda: features(byte, level=1), "level=", "files")
    normalised = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert features(torch.randn(3, 30, 26), **normalised).isfinite().all()


def test_a_model_that_gives_no_numbers(model, tmp_path):
    broken = linsight.create_model("vit_tiny", attention="inline", depth=1, num_classes=3).eval()
    torch.nn.init.constant_(broken.head.bias, torch.nan)
    refused(lambda: linsight.stream(broken, noise(30, 26, 3)), "no numbers", "the image")
    torch.nn.init.constant_(broken.norm.weight, torch.inf)
    for output in ("features", "map"):
        refused(lambda output=output: linsight.stream(broken, noise(30, 26, 3), output=output), "no numbers")


def pyramid(path, **more):
    full = np.repeat(np.repeat(noise(8, 8, 3), 16, 0), 16, 1)
    with tifffile.TiffWriter(path) as file:
        file.write(full, photometric="rgb", tile=(16, 16), subifds=2, **more)
        for step in (2, 4):
            file.write(full[::step, ::step], photometric="rgb", tile=(16, 16), subfiletype=1)
    return full


def test_levels_of_a_tiff_file(tmp_path):
    path = tmp_path / "a.tif"
    full = pyramid(path, resolution=(40000, 40000), resolutionunit=3)  # a quarter of a micron
    for asked, step in (({}, 1), ({"level": 2}, 4), ({"mpp": 0.5}, 2), ({"mpp": 1.41}, 4), ({"mpp": 0.2}, 1)):
        with opened(path, 3, **asked) as (picture, _):
            assert np.array_equal(picture[0 : 128 // step, 0 : 128 // step], full[::step, ::step])
    levels = "0: 128 x 128 at 0.25 microns a pixel; 1: 64 x 64 at 0.5 microns a pixel; 2: 32 x 32 at 1"
    for asked, words in (
        ({"level": 3}, "no level 3"),
        ({"mpp": 1.42}, "no level near 1.42"),  # more than half a step away
        ({"level": 1, "mpp": 0.5}, ""),
        ({"mpp": 0.0}, ""),
    ):
        refused(lambda asked=asked: opened(path, 3, **asked).__enter__(), words, levels if words else "mpp=")
    pyramid(path)
    refused(lambda: opened(path, 3, mpp=0.5).__enter__(), "does not say its microns", "0: 128 x 128; 1: 64 x 64")
    plain = tmp_path / "a.png"
    Image.fromarray(full).save(plain)
    refused(lambda: opened(plain, 3, level=1).__enter__(), "no level 1", "0: 128 x 128")


def test_levels_of_a_slide(tmp_path, monkeypatch):
    (tmp_path / "a.svs").touch()
    read = []

    class Slide:
        properties = types.MappingProxyType({"openslide.mpp-x": "0.25"})
        level_dimensions, level_downsamples = ((800, 400), (200, 100)), (1.0, 4.0)

        def __init__(self, path):
            pass

        def read_region(self, place, level, size):
            read.append((place, level, size))
            return Image.new("RGBA", size)

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "openslide", types.SimpleNamespace(OpenSlide=Slide))
    with opened(tmp_path / "a.svs", 3, mpp=1.0) as (picture, _):
        assert picture.shape == (100, 200, 3) and picture[10:20, 5:7].shape == (10, 2, 3)
    assert read == [((20, 40), 1, (2, 10))]
    refused(lambda: opened(tmp_path / "a.svs", 3, level=2).__enter__(), "1: 200 x 100 at 1 microns")


def test_extensions_are_those_that_pillow_opens():
    assert {".png", ".jpg", ".jfif", ".webp", ".bmp", ".tif", ".gif", ".ppm", ".jp2", ".btf"} <= extensions()
    assert not {".txt", ".h5", ".pdf", ".mpg", ".eps", ""} & extensions()
    assert left_out(["a/b.TXT", "c.txt", "README"]) == "3 files of other kinds left out: .txt 2, without extension 1"
    assert left_out([]) == ""


def test_json_is_written_in_one_place_only():
    """Where what is no number is refused: it has no word for it."""
    source = Path(linsight.__file__).parent
    assert [p.name for p in source.rglob("*.py") if "json.dump" in p.read_text(encoding="utf-8")] == ["files.py"]
    from linsight.runtime.files import to_json

    refused(lambda: to_json({"top1": float("nan")}), "no number", "JSON")


def test_pillow_s_own_images_and_arrays():
    assert np.array_equal(np.asarray(decode(Image.fromarray(noise(*SIDES, 3)), "RGB").image), noise(*SIDES, 3))
    deep = decode(noise(*SIDES, dtype=np.uint16), "L").image
    assert np.array_equal(np.asarray(deep), np.floor(noise(*SIDES, dtype=np.uint16) / 257 + 0.5))
    with pytest.raises(ImageError, match="5 channels"):
        decode(noise(*SIDES, 5), "RGB")
    with io.BytesIO() as file:
        Image.fromarray(noise(*SIDES)).save(file, "png")
        file.seek(0)
        assert np.array_equal(np.asarray(decode(file, "L").image), noise(*SIDES))


def test_mutated_pictures_are_an_answer_or_one_line(tmp_path):
    judge = mutated_pictures.Judge()
    for case in mutated_pictures.generate(len(mutated_pictures.KINDS), 3):
        path = tmp_path / case.name
        path.write_bytes(case.data)
        assert judge(path)[1] == [], f"{case.kind}, {case.damage}"


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_thousand_mutated_pictures(capsys):
    assert mutated_pictures.main(["--count", "1000"]) == 0
    assert "0 tracebacks; 0 pictures with a fault" in capsys.readouterr().out
