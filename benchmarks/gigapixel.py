"""How time and memory grow up to a gigapixel, under a hard limit of memory: streamed, dense, and with softmax.

    python benchmarks/gigapixel.py --photos path/to/photographs --scratch path/to/a/large/disk --docs docs
    python benchmarks/gigapixel.py --sides 2048,4096

A picture of 32,768 x 32,768 pixels is made of random crops of photographs and lies in a memory-mapped file; smaller
ones are its corner. Each point (a model, a way to run it, a side) is a process of its own in which Linux refuses any
allocation beyond the limit: RLIMIT_DATA, which counts all private writable memory, but no pages of files that are
mapped shared. Its time is given by the clock and in CPU seconds of all its threads, which other work on the machine
changes less. What a process really holds (RssAnon, VmData, files in the scratch folder) is sampled 20 times a second.
A finished point is a row of --csv at once, and is not run again: a run that was stopped goes on. Linux only.
"""

import argparse
import csv
import os
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _gigapixel_docs as docs
import numpy as np
import timm
import torch
from _script import exit_status
from torch import Tensor, nn

import linsight
from linsight.bench import Setting, Side, Worker, run_facts, write_rows
from linsight.data import decode
from linsight.errors import LinsightError
from linsight.runtime.figures import require_matplotlib

PATCH = 512  # side of a crop in the picture
FREE = 60e9  # bytes of scratch files, at most


class Form(NamedTuple):
    """A way to run a model.

    growth: by what its time is multiplied when the side doubles, to tell if it is payable; 0: it stops before.
    """

    model: str
    way: str
    maps: str = ""
    growth: int = 4


STREAMS = (Form("inline_deit_tiny", "streamed", "float32"), Form("inline_pvt_tiny", "streamed", "bfloat16"))
SOFTMAX = "deit_tiny_patch16_224"
WHOLE = (
    Form("inline_deit_tiny", "dense"),
    Form("inline_pvt_tiny", "dense"),
    Form(SOFTMAX, "all scores in memory", growth=0),
    Form(SOFTMAX, "scaled_dot_product_attention", growth=16),
)
NOTED = ("wall_s", "cpu_s", "start_mb", "anon_mb", "data_mb", "scratch_gb", "logits", "error")
COLUMNS = ("model", "way", "maps", "side", "tile", "limit_gb", *NOTED)
FACTS = ("device", "threads", "date", "torch", "timm", "linsight")


class Point(NamedTuple):
    form: Form
    side: int
    tile: int
    limit: float
    threads: int
    picture: Path
    scratch: Path


def measure(point: Point, sides: dict[int, Any], send: Callable[..., None]) -> None:
    """In the process of one point."""
    (side,) = sides
    torch.set_num_threads(point.threads)
    resource.setrlimit(resource.RLIMIT_DATA, (int(point.limit), int(point.limit)))
    torch.manual_seed(0)  # the same weights for each way to run a model
    model = build(point.form).eval()
    with Watch(point.scratch) as watch:
        begun, spent = time.perf_counter(), time.process_time()
        try:
            with torch.inference_mode():
                logits = forward(model, point)
        except (LinsightError, MemoryError, RuntimeError) as error:
            send(side, "error", told(error))
        else:
            shown = " ".join(f"{value:.6g}" for value in logits[0, :8].tolist())
            send(side, "facts", {"logits": shown})
        facts = {"wall_s": time.perf_counter() - begun, "cpu_s": time.process_time() - spent}
    send(side, "facts", facts | watch.facts())


def forward(model: Any, point: Point) -> Tensor:
    """Logits `(1, 1000)`."""
    pixels = np.load(point.picture, mmap_mode="r")[: point.side, : point.side]
    if point.form in STREAMS:
        maps = getattr(torch, point.form.maps)
        return linsight.stream(model, pixels, tile=point.tile, scratch=point.scratch, dtype=maps)
    cfg: Any = model.pretrained_cfg
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float()
    mean, std = (255 * torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return model(image.sub_(mean).div_(std))


def build(form: Form) -> nn.Module:
    if form.model != SOFTMAX:
        return linsight.create_model(form.model)
    model = timm.create_model(form.model, dynamic_img_size=True)
    for block in model.blocks:
        block.attn.fused_attn = form.way == "scaled_dot_product_attention"
    return model


def told(error: BaseException) -> str:
    """Of an allocation that was refused, how large it was; of anything else its first line."""
    asked = re.search(r"allocate (\d+) bytes", str(error))
    if asked:
        return f"no memory for {int(asked[1]) / 1e9:.1f} GB more"
    return "no memory" if isinstance(error, MemoryError) else str(error).partition("\n")[0]


class Watch:
    """What this process holds, sampled in a thread: its peaks of anonymous memory, and of files in a folder."""

    def __init__(self, folder: Path, seconds: float = 0.05) -> None:
        self.folder, self.seconds = folder, seconds
        self.start, self.peaks = 0.0, {"RssAnon": 0.0, "VmData": 0.0, "scratch": 0.0}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._sample()
        self.start = self.peaks["RssAnon"]
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.thread.join()
        self._sample()

    def facts(self) -> dict[str, float]:
        anon, data = (self.peaks[key] / 1e6 for key in ("RssAnon", "VmData"))
        return {
            "start_mb": self.start / 1e6,
            "anon_mb": anon,
            "data_mb": data,
            "scratch_gb": self.peaks["scratch"] / 1e9,
        }

    def _run(self) -> None:
        while not self.ended.wait(self.seconds):
            self._sample()

    def _sample(self) -> None:
        found = {"scratch": 0.0}
        for path in self.folder.glob("*"):
            try:
                found["scratch"] += 512 * path.stat().st_blocks
            except FileNotFoundError:  # a map that is not needed any more
                continue
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key in self.peaks:
                found[key] = 1024 * float(value.split()[0])
        self.peaks = {key: max(value, found[key]) for key, value in self.peaks.items()}


def photographs(folder: Path | None, most: int = 64) -> list[np.ndarray]:
    """`(h, w, 3)` uint8; without a folder the one that comes with matplotlib."""
    if folder is None:
        require_matplotlib("the photograph that pictures are made of, without --photos,")
        from matplotlib import cbook

        paths = [Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        paths = paths[:: max(1, len(paths) // most)]
    if not paths:
        raise LinsightError(f"'{folder}' has no photographs: name a folder with .jpg or .png files in it")
    return [np.asarray(decode(path, "RGB", str(path)).image) for path in paths]


def make_picture(path: Path, side: int, photos: list[np.ndarray]) -> None:
    """A `.npy` file `(side, side, 3)` uint8 of random crops of the photographs, which go on mirrored at their rims."""
    random = np.random.default_rng(0)

    def mirrored(length: int) -> np.ndarray:
        place = (random.integers(2 * length) + np.arange(PATCH)) % (2 * length)
        return np.minimum(place, 2 * length - 1 - place)

    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (side, side, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        for top in range(0, side, PATCH):
            band = np.empty((PATCH, side, 3), np.uint8)
            for left in range(0, side, PATCH):
                photo = photos[random.integers(len(photos))]
                crop = photo[np.ix_(mirrored(photo.shape[0]), mirrored(photo.shape[1]))]
                band[:, left : left + PATCH] = crop[:, : side - left]
            file.write(band[: side - top].tobytes())


def points(options: argparse.Namespace, folder: Path) -> Iterator[Point]:
    """All, from small to large: what is there at any moment is of use."""
    least = min(options.sides)
    for side in sorted({least // 4, least // 2, *options.sides}):
        for form in (*STREAMS, *WHOLE):
            if side >= least or form in WHOLE:
                limit, picture, maps = 1e9 * options.limit, folder / "picture.npy", folder / "maps"
                yield Point(form, side, options.tile, limit, options.threads, picture, maps)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is not in the CSV file yet, and return all rows."""
    # for the processes of the points: a thread that waits for another shall sleep, so that CPU seconds are of work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rows = read(options.csv)
    facts = run_facts(Setting("cpu", "off", options.threads))
    facts = {key: facts[key] for key in FACTS}
    found = {(row["model"], row["way"], row["side"]): row for row in rows}
    with tempfile.TemporaryDirectory(prefix="gigapixel-", dir=options.scratch) as name:
        folder = Path(name)
        for point in points(options, folder):
            form, side = point.form, point.side
            if (*form[:2], side) in found:
                continue
            if any(row["error"] and row["side"] < side for row in rows if (row["model"], row["way"]) == form[:2]):
                continue  # it has stopped
            before = found.get((*form[:2], side // 2))
            expected = before["cpu_s"] / options.threads * form.growth if before else 0.0
            row = {"model": form.model, "way": form.way, "maps": form.maps, "side": side, "limit_gb": options.limit}
            row |= dict.fromkeys(NOTED, "") | facts
            if form in STREAMS:
                row["tile"] = point.tile
            elif expected > options.patience:
                row["error"] = f"not run: it would take about {docs.duration(expected)}"
            if not row["error"]:
                if not point.picture.exists():
                    check_disk(folder, options)
                    make_picture(point.picture, max(options.sides), photographs(options.photos))
                with Worker(measure, 7 * 86400.0 if form in STREAMS else options.patience) as worker:
                    (done,) = worker.run(point, [0])
                row |= noted(done)
                shutil.rmtree(point.scratch, ignore_errors=True)
            found[*form[:2], side] = row
            rows.append(row)
            write_rows(options.csv, rows, {}, (*COLUMNS, *FACTS))
            print(", ".join(f"{key} {row[key]}" for key in ("model", "way", "side", *NOTED) if row[key]), flush=True)
    return rows


def noted(side: Side) -> dict[str, Any]:
    facts = {key: round(value, 3) if isinstance(value, float) else value for key, value in side.facts.items()}
    return facts | ({"error": side.error} if side.error else {})


def check_disk(folder: Path, options: argparse.Namespace) -> None:
    need, free = 3 * max(options.sides) ** 2, shutil.disk_usage(folder).free
    if need > min(free, FREE):
        raise LinsightError(f"the picture needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: pass --scratch")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a run before, if there was one."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    if rows and set(rows[0]) != {*COLUMNS, *FACTS}:
        raise LinsightError(f"'{path}' is no file of this script: name another with --csv")
    for row in rows:
        numbers = {key for key in row if key.endswith(("_s", "_mb", "_gb"))}
        row |= {key: float(row[key]) for key in numbers if row[key]} | {"side": int(row["side"])}
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    sides = [4096, 8192, 16384, 32768]
    add("--photos", type=Path, help="a folder of photographs; without it, the one that comes with matplotlib")
    add("--scratch", type=Path, default=Path(), help="a folder on a disk with 40 GB free")
    add("--sides", type=lambda text: [int(side) for side in text.split(",")], default=sides, help="pixels, by commas")
    add("--tile", type=int, default=1024, help="pixels of a tile's side")
    add("--limit", type=float, default=8.0, help="GB of anonymous memory")
    add("--patience", type=float, default=3600.0, help="seconds for what is not streamed, expected or taken")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--csv", type=Path, default=Path("gigapixel.csv"), help="file to write, and to go on with")
    add("--docs", type=Path, help="the folder of gigapixel.md, to write the result into")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    def work() -> None:
        if sys.platform != "linux":
            raise LinsightError("only Linux counts memory in a way that this can limit")
        options = parse(sys.argv[1:] if arguments is None else arguments)
        if options.docs:
            docs.page_of(options.docs)
        rows = run(options)
        print(docs.text_of(rows, FACTS))
        if options.docs:
            docs.write(options.docs, rows, FACTS)

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
