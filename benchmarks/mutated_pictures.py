"""Mutated pictures: a thousand files of many formats, depths and kinds of damage, each an answer or one line.

    python benchmarks/mutated_pictures.py
    python benchmarks/mutated_pictures.py --count 5000 --seed 1 --keep FOLDER

Each picture is handed to the reader as a path and as bytes, to `predict`, and to the stream. An answer is finite, and
the reader and the stream see the same pixels. Everything else has to be one line; a traceback, a warning of a library,
words on standard error, pixels that differ or a picture that takes longer than 20 seconds are faults, which --keep
writes into a folder.
"""

import argparse
import collections
import contextlib
import io
import itertools
import os
import pathlib
import random
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from _script import exit_status
from PIL import Image

from linsight.data import decode, opened
from linsight.errors import LinsightError
from linsight.streaming.source import Source
from linsight.tasks import ClassifyRecipe
from linsight.train import Tiling, Trained, predict, predict_stream
from linsight.train.model import build

SECONDS = 20
MEMORY = 3 * 2**30  # bytes above what is used at the start: files may declare any size
MOST = 10**7  # pixels of a picture that is streamed here
SIDES = ((1, 1), (1, 40), (17, 23), (40, 33), (64, 64), (70, 45))


class Case(NamedTuple):
    """A file: its name, what it was before the damage, the damage, and its bytes."""

    name: str
    kind: str
    damage: str
    data: bytes


def pixels(draw: random.Random, channels: int, dtype: Any = np.uint8) -> Any:
    """Noise of a random size, (h, w) or (h, w, channels)."""
    numbers = np.random.default_rng(draw.randrange(2**32))
    shape = draw.choice(SIDES)
    shape = shape if channels == 1 else (*shape, channels)
    if np.dtype(dtype).kind == "f":
        return (numbers.random(shape) * draw.choice((1, 255))).astype(dtype)
    return numbers.integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def pillow(mode: str, suffix: str, **options: Any) -> Callable[[random.Random], bytes]:
    """A file that Pillow writes; `mode` is that of the picture."""

    def write(draw: random.Random) -> bytes:
        direct = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3, "LAB": 3, "HSV": 3}
        given = {name: value(draw) if callable(value) else value for name, value in options.items()}
        if mode in direct:
            data = pixels(draw, direct[mode])
            image = Image.frombytes(mode, data.shape[1::-1], data.tobytes())
        elif mode in ("I;16", "I", "F"):
            kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
            image = Image.fromarray(
                pixels(draw, 1, kind) >> (mode == "I") * 16 if mode != "F" else pixels(draw, 1, kind)
            )
        else:
            image = Image.fromarray(pixels(draw, 3)).convert(mode)
        if given.pop("frames", False):
            given |= {"save_all": True, "append_images": [image.copy() for _ in range(draw.randint(1, 4))]}
        file = io.BytesIO()
        image.save(file, Image.registered_extensions()[suffix], **given)
        return file.getvalue()

    return write


def tiff(dtype: Any, channels: int, **options: Any) -> Callable[[random.Random], bytes]:
    """A file that tifffile writes."""

    def write(draw: random.Random) -> bytes:
        import tifffile

        data = pixels(draw, channels, dtype)
        given = {"photometric": "rgb" if channels > 2 else "minisblack", **options}
        if given.pop("holes", False):
            data.flat[draw.randrange(data.size)] = draw.choice((np.nan, np.inf, -np.inf))
        if given.pop("stack", False):
            data = np.stack([data] * 3)
        if given.get("planarconfig") == "separate":
            data = np.moveaxis(data, -1, 0)
        if given.pop("turned", False):
            given["extratags"] = [(274, "H", 1, draw.randint(0, 9), True)]
        file = io.BytesIO()
        tifffile.imwrite(file, data, **given)
        return file.getvalue()

    return write


def array(dtype: Any, channels: int) -> Callable[[random.Random], bytes]:
    """A .npy file."""

    def write(draw: random.Random) -> bytes:
        file = io.BytesIO()
        np.save(file, np.zeros((9, 9), dtype) if dtype in (bool, complex) else pixels(draw, channels, dtype))
        return file.getvalue()

    return write


def turned(draw: random.Random) -> Any:
    """EXIF that tells an orientation."""
    exif = Image.Exif()
    exif[274] = draw.randint(0, 9)
    return exif


KINDS: dict[str, tuple[str, Callable[[random.Random], bytes]]] = {
    **{f"png {mode}": (".png", pillow(mode, ".png")) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    "png transparent palette": (".png", pillow("P", ".png", transparency=bytes(range(0, 256, 2)))),
    "png colour key": (".png", pillow("RGB", ".png", transparency=(1, 2, 3))),
    "png turned": (".png", pillow("RGB", ".png", exif=turned)),
    "apng": (".png", pillow("RGBA", ".png", frames=True)),
    **{f"jpeg {mode}": (".jpg", pillow(mode, ".jpg")) for mode in ("L", "RGB", "CMYK", "YCbCr")},
    "jpeg turned": (".jpg", pillow("RGB", ".jpg", exif=turned)),
    "jpeg progressive": (".jpeg", pillow("RGB", ".jpg", progressive=True)),
    "mpo": (".jpg", pillow("RGB", ".mpo", frames=True)),
    "webp": (".webp", pillow("RGB", ".webp")),
    "webp RGBA": (".webp", pillow("RGBA", ".webp", lossless=True)),
    "webp animated": (".webp", pillow("RGB", ".webp", frames=True)),
    "avif": (".avif", pillow("RGB", ".avif")),
    "avif turned": (".avif", pillow("RGBA", ".avif", exif=turned)),
    "gif": (".gif", pillow("P", ".gif")),
    "gif animated": (".gif", pillow("P", ".gif", frames=True)),
    **{f"bmp {mode}": (".bmp", pillow(mode, ".bmp")) for mode in ("1", "L", "P", "RGB", "RGBA")},
    "jp2": (".jp2", pillow("RGB", ".jp2")),
    "jp2 I;16": (".jp2", pillow("I;16", ".jp2")),
    "ico": (".ico", pillow("RGBA", ".ico")),
    "icns": (".icns", pillow("RGBA", ".icns")),
    "tga": (".tga", pillow("RGBA", ".tga")),
    "pcx": (".pcx", pillow("P", ".pcx")),
    "sgi": (".sgi", pillow("RGB", ".sgi")),
    "dds": (".dds", pillow("RGBA", ".dds")),
    "im": (".im", pillow("F", ".im")),
    "im I": (".im", pillow("I", ".im")),
    "msp": (".msp", pillow("1", ".msp")),
    "xbm": (".xbm", pillow("1", ".xbm")),
    **{f"ppm {mode}": (".ppm", pillow(mode, ".ppm")) for mode in ("1", "L", "RGB", "I;16")},
    "pfm": (".pfm", pillow("F", ".pfm")),
    **{
        f"tiff {mode}": (".tif", pillow(mode, ".tif"))
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
    },
    **{f"tiff {how}": (".tif", pillow("RGB", ".tif", compression=how)) for how in ("tiff_lzw", "jpeg", "packbits")},
    "tiff group4": (".tif", pillow("1", ".tif", compression="group4")),
    "tiff frames": (".tif", pillow("L", ".tif", frames=True)),
    **{
        f"tiff {np.dtype(dtype).name} x {channels}": (".tiff", tiff(dtype, channels))
        for dtype in (np.uint8, np.uint16, np.int16, np.uint32, np.float16, np.float32, np.float64)
        for channels in (1, 3)
    },
    "tiff tiles": (".tif", tiff(np.uint8, 3, tile=(16, 16), compression="zlib")),
    "tiff strips": (".tif", tiff(np.uint16, 1, rowsperstrip=7, compression="zlib", predictor=True)),
    "tiff planes": (".tif", tiff(np.uint8, 3, planarconfig="separate")),
    "tiff turned": (".tif", tiff(np.uint8, 3, turned=True)),
    "tiff stack": (".tif", tiff(np.uint8, 1, stack=True)),
    "tiff alpha": (".tif", tiff(np.uint16, 4, extrasamples=["unassalpha"])),
    "tiff 6 channels": (".tif", tiff(np.uint8, 6, photometric="minisblack", planarconfig="contig")),
    "tiff holes": (".tif", tiff(np.float32, 3, holes=True)),
    **{
        f"npy {np.dtype(dtype).name} x {channels}": (".npy", array(dtype, channels))
        for dtype, channels in (
            (np.uint8, 3),
            (np.uint16, 1),
            (np.int8, 1),
            (np.int64, 3),
            (np.float32, 3),
            (np.float64, 4),
            (bool, 1),
            (complex, 1),
        )
    },
}


def cut(data: bytearray, draw: random.Random) -> None:
    """Lose the end."""
    del data[draw.randrange(len(data)) :]


def lose_tail(data: bytearray, draw: random.Random) -> None:
    """Lose the last few bytes."""
    del data[-draw.randint(1, 16) :]


def flip(data: bytearray, draw: random.Random) -> None:
    """Change some bytes anywhere."""
    for _ in range(draw.choice((1, 4, 32))):
        data[draw.randrange(len(data))] ^= draw.randint(1, 255)


def flip_head(data: bytearray, draw: random.Random) -> None:
    """Change some bytes among the first hundred, where sizes and kinds stand."""
    for _ in range(draw.choice((1, 2, 8))):
        data[draw.randrange(min(100, len(data)))] ^= draw.randint(1, 255)


def blank(data: bytearray, draw: random.Random) -> None:
    """Zeros from somewhere on, as of a lost block of a disk."""
    start = draw.randrange(len(data))
    data[start:] = bytes(len(data) - start)


def blank_head(data: bytearray, draw: random.Random) -> None:
    """Zeros where the file begins."""
    count = min(len(data), draw.choice((1, 4, 16, 64)))
    data[:count] = bytes(count)


def resized(data: bytearray, side: int) -> None:
    """Another size in the header, where it is known where that stands; checksums fit."""
    if data.startswith(b"\x89PNG"):
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data.startswith(b"GIF8"):
        data[6:10] = struct.pack("<HH", side & 0xFFFF, side & 0xFFFF)
    elif data.startswith(b"BM"):
        data[18:26] = struct.pack("<ii", side & 0x7FFFFFFF, side & 0x7FFFFFFF)
    elif (place := data.find(b"\xff\xc0")) > 0 or (place := data.find(b"\xff\xc2")) > 0:
        data[place + 5 : place + 9] = struct.pack(">HH", side & 0xFFFF, side & 0xFFFF)
    elif data.startswith((b"II*\0", b"MM\0*")):
        order = "<" if data.startswith(b"II") else ">"
        start = struct.unpack(order + "I", data[4:8])[0]
        for entry in range(start + 2, min(start + 200, len(data) - 12), 12):
            if struct.unpack(order + "H", data[entry : entry + 2])[0] in (256, 257):
                data[entry + 2 : entry + 12] = struct.pack(order + "HII", 4, 1, side)
    elif data.startswith(b"P") and data[2:3] in b"\n ":
        data[3:3] = b"9" * 6
    else:
        data[8:16] = struct.pack("<II", side, side)


def giant(data: bytearray, draw: random.Random) -> None:
    """A giant size declared."""
    resized(data, draw.choice((15000, 20000, 40000, 65535, 2**31 - 1, 2**32 - 1)))


def nothing(data: bytearray, draw: random.Random) -> None:
    """A size of zero declared."""
    resized(data, 0)


def empty(data: bytearray, draw: random.Random) -> None:
    """No byte at all."""
    data.clear()


def text(data: bytearray, draw: random.Random) -> None:
    """Words in place of a picture."""
    data[:] = draw.choice((b"no picture\n", b"<html><body>404</body></html>", b"version https://git-lfs\n", b"P5\n"))


def spliced(data: bytearray, draw: random.Random) -> None:
    """The end of something else."""
    middle = len(data) // 2
    data[middle:] = draw.randbytes(len(data) - middle)


def whole(data: bytearray, draw: random.Random) -> None:
    """As it was written."""


DAMAGES = (
    whole,
    whole,
    cut,
    cut,
    lose_tail,
    flip,
    flip,
    flip_head,
    flip_head,
    blank,
    blank_head,
    giant,
    giant,
    nothing,
    empty,
    text,
    spliced,
)
SUFFIXES = (".png", ".jpg", ".tif", ".webp", ".bmp", ".npy", ".gif", ".avif", "", ".txt")


def generate(count: int, seed: int) -> Iterator[Case]:
    """`count` files; every kind comes equally often, and damages are drawn."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        suffix, write = KINDS[kind]
        with warnings.catch_warnings():  # that a format is to be given up
            warnings.simplefilter("ignore")
            data, damage = bytearray(write(draw)), draw.choice(DAMAGES)
        damage(data, draw)
        words = [damage.__name__]
        if draw.random() < 0.15:
            suffix = draw.choice(SUFFIXES)
            words.append(f"named {suffix or 'nothing'}")
        yield Case(f"{number:05}{suffix}", kind, ", ".join(words), bytes(data))


def small() -> Trained:
    """A model that takes hardly any time."""
    own = {"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    recipe = ClassifyRecipe(
        model="vit_tiny", attention="inline", model_args=own, img_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3
    )
    torch.manual_seed(0)
    return Trained(build(recipe, 3).eval(), recipe, ("a", "b", "c"), pathlib.Path("none"))


def by_path(path: pathlib.Path) -> Any:
    """The pixels that training sees."""
    return np.asarray(decode(path, "RGB", path.name).image)


def by_bytes(path: pathlib.Path) -> Any:
    """The pixels that training sees of a row of Parquet."""
    with path.open("rb") as file:
        return np.asarray(decode(file, "L", path.name).image)


def by_stream(path: pathlib.Path) -> Any:
    """The pixels that a stream sees, in two parts."""
    with opened(path, 3) as (picture, name):
        source = Source(picture, (0.0,) * 3, (1.0,) * 3, name)
        height, width = source.size
        if height * width > MOST:
            return None
        edges = sorted({0, (height + 1) // 2, height})
        bands = [source.read((top, end), (0, width)) for top, end in itertools.pairwise(edges)]
        return torch.cat(bands, 2)[0].permute(1, 2, 0).numpy() * 255


def streamed(trained: Trained, path: pathlib.Path) -> Any:
    """The answer of a stream, unless there is too much to compute."""
    with opened(path, 3) as (picture, _):
        if picture.shape[0] * picture.shape[1] > MOST:
            return None
    return predict_stream(trained, [path], Tiling(device="cpu", amp="off"))[0][0].probabilities


class Judge:
    """Hands a file to every door, and says how each answers."""

    def __init__(self) -> None:
        trained = small()
        self.doors: dict[str, Callable[[pathlib.Path], Any]] = {
            "path": by_path,
            "bytes": by_bytes,
            "pixels of a stream": by_stream,
            "predict": lambda path: predict(trained, [path], device="cpu", amp="off")[0][0].probabilities,
            "predict --stream": lambda path: streamed(trained, path),
        }

    def __call__(self, path: pathlib.Path) -> tuple[collections.Counter[str], list[str]]:
        """How many doors answered and how many refused; and a line for each fault."""
        counts, faults, found = collections.Counter[str](), list[str](), dict[str, Any]()
        for door, call in self.doors.items():
            with warnings.catch_warnings(record=True) as said, stderr() as words, limited():
                warnings.simplefilter("always")
                try:
                    found[door] = call(path)
                    counts["answers"] += 1
                except LinsightError as error:
                    counts["refusals"] += 1
                    if "\n" in str(error) or len(str(error)) > 600:
                        faults.append(f"{door}: not one line: {error!r}")
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    counts["tracebacks"] += 1
                    faults.append(f"{door}: {''.join(traceback.format_exception(error))}")
            faults += [f"{door}: warns: {warning.message}" for warning in said]
            if words.text:
                faults.append(f"{door}: says {words.text!r}")
        for door in ("path", "pixels of a stream"):
            if isinstance(found.get(door), np.ndarray) and not np.isfinite(found[door]).all():
                faults.append(f"{door}: pixels that are no numbers")
        seen = [found[door] for door in ("path", "pixels of a stream") if found.get(door) is not None]
        if len(seen) == 2 and (seen[0].shape != seen[1].shape or np.abs(seen[0] - seen[1]).max() > 0.51):
            faults.append(f"pixels differ: {seen[0].shape} and {seen[1].shape}")
        return counts, faults


class _Words:
    text = ""


@contextlib.contextmanager
def stderr() -> Iterator[_Words]:
    """Catch what is written to standard error while entered, by libraries in C too."""
    words, kept = _Words(), os.dup(2)
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield words
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            words.text = file.read().decode(errors="replace").strip()[:200]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError after SECONDS of the processor's time, where the system has such alarms."""
    if not hasattr(signal, "SIGPROF"):
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory() -> None:
    """No more than MEMORY above what this process has, where the system can."""
    try:
        import resource
    except ImportError:
        return
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=pathlib.Path, help="a folder for files with a fault")
    options = parser.parse_args(arguments)
    judge, total, faulty = Judge(), collections.Counter[str](), 0
    limit_memory()
    damages: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        for case in generate(options.count, options.seed):
            path = pathlib.Path(folder, case.name)
            path.write_bytes(case.data)
            counts, faults = judge(path)
            path.unlink()
            total += counts
            damages[case.damage.partition(",")[0]] += counts
            if faults:
                faulty += 1
                print(f"{case.name}: {case.kind}, {case.damage}\n  " + "\n  ".join(faults), flush=True)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    (options.keep / case.name).write_bytes(case.data)
    print(f"{'damage':12} {'answers':>8} {'refusals':>9} {'tracebacks':>11}")
    for damage, counts in sorted(damages.items()):
        print(f"{damage:12} {counts['answers']:>8} {counts['refusals']:>9} {counts['tracebacks']:>11}")
    print(
        f"{options.count} pictures of {len(KINDS)} kinds at {len(judge.doors)} doors: {total['answers']} answers, "
        f"{total['refusals']} refusals of one line, {total['tracebacks']} tracebacks; {faulty} pictures with a fault"
    )
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(exit_status(__file__, main))
