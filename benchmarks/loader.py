"""Images a second of the reader alone, from each kind of data, beside what a model trains on this machine.

    python benchmarks/loader.py
    python benchmarks/loader.py --images 4096 --workers 0,4,8 --model inline_swin_tiny --device cuda --docs docs

JPEG files of photographs' size are made of noise that is smooth, as photographs are, and kept as a folder of class
folders, as tar shards and as Parquet files. Each is read as in training, with the crops and colours of the recipe
`photos`, for some seconds, in rounds that go through all of them by turns. The model trains on batches that are there.
--docs puts the table into big-data.md there.
"""

import argparse
import io
import itertools
import platform
import re
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _script import exit_status
from PIL import Image
from torch.nn import functional as F

import linsight
from linsight.data.disk import on_disk
from linsight.data.images import Batch, Samples, cached, loader, train_transform
from linsight.data.random import Batches
from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.device import pick_device
from linsight.runtime.files import write_text
from linsight.train import open_data, resolve

CLASSES = 4
BLOCK = re.compile(r"(<!-- generated: reader -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEAD = 2  # batches before the clock starts


def picture(number: int, sides: tuple[int, int]) -> bytes:
    """A JPEG of smooth noise with some grain."""
    draw = np.random.default_rng(number)
    width, height = sides
    smooth = Image.fromarray(draw.integers(0, 255, (height // 12, width // 12, 3), dtype=np.uint8))
    pixels = np.asarray(smooth.resize(sides, Image.Resampling.BICUBIC), np.int16)
    grain = draw.integers(-6, 7, pixels.shape, dtype=np.int16)
    data = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(data, "jpeg", quality=88)
    return data.getvalue()


def write(folder: Path, pictures: Sequence[bytes], shards: int) -> dict[str, str]:
    """The data of each kind, as a recipe calls it."""
    import datasets

    for number, data in enumerate(pictures):
        path = folder / "files" / "train" / f"{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    (folder / "tars").mkdir()
    (folder / "tables").mkdir()
    for shard in range(shards):
        own = {number: pictures[number] for number in range(shard, len(pictures), shards)}
        with tarfile.open(folder / "tars" / f"train-{shard:04}.tar", "w") as tar:
            for number, data in own.items():
                for name, content in ((f"{number}.cls", f"{number % CLASSES}".encode()), (f"{number}.jpg", data)):
                    about = tarfile.TarInfo(name)
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
        images = [{"bytes": data, "path": None} for data in own.values()]
        rows = {"image": images, "label": [number % CLASSES for number in own]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / "tables" / f"train-{shard:05}-of-{shards:05}.parquet")
    return {
        "JPEG files in class folders": str(folder / "files"),
        "tar shards, `order=full`": str(folder / "tars"),
        "tar shards, `order=shards`": str(folder / "tars"),
        "Parquet files": str(folder / "tables"),
        "Parquet files as a stream, `hfids/`": f"hfids/{folder / 'tables'}",
        "`cache=memory`": str(folder / "files"),
        "`cache=disk`": str(folder / "files"),
    }


def feeds(
    kinds: dict[str, str], folder: Path, size: tuple[int, int], batch: int
) -> dict[str, Callable[[int], Iterable[Batch]]]:
    """For each kind, a loader of training batches by its number of worker processes."""
    found: dict[str, Callable[[int], Iterable[Batch]]] = {}
    for kind, data in kinds.items():
        order = "shards" if kind.endswith("order=shards`") else "full"
        given = {"data": data, "data_dir": str(folder / "hf"), "order": order, "val_split": "train"}
        recipe = resolve("photos", given)
        source = open_data(recipe).train
        if kind == "`cache=memory`":
            source, _, _ = cached(source, 3)
        if kind == "`cache=disk`":
            source, _, _ = on_disk(source, 3, None, folder / "kept", 0, lambda line: None)
        found[kind] = _opener(recipe, source, size, batch)
    return found


def _opener(recipe: Recipe, source: Any, size: tuple[int, int], batch: int) -> Callable[[int], Iterable[Batch]]:
    samples = Samples(source, train_transform(recipe, size), 3, 0)

    def opened(workers: int) -> Iterable[Batch]:
        shards = source.shards if recipe.order == "shards" else None
        batches = Batches(len(source), batch, shuffle=True, shards=shards)
        return loader(samples, batches, workers=workers, pin=False)

    return opened


def speed(feed: Iterable[Batch], seconds: float) -> float:
    """Images a second, once it runs."""
    images, start = 0, 0.0
    for number, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(feed))):
        if batch.bad:
            raise LinsightError(batch.bad[0])
        if number < HEAD:
            start = time.perf_counter()
            continue
        images += len(batch.targets)
        if time.perf_counter() - start > seconds:
            break
    return images / (time.perf_counter() - start)


def training(model: Any, device: torch.device, size: tuple[int, int], batch: int, seconds: float) -> float:
    """Images a second that a model trains, in float32, on batches that are there."""
    images = torch.randn(batch, 3, *size, device=device)
    targets = torch.zeros(batch, dtype=torch.long, device=device)
    optimiser = torch.optim.AdamW(model.parameters())
    done, start = -1, time.perf_counter()
    while done < 1 or time.perf_counter() - start < seconds:
        F.cross_entropy(model(images), targets).backward()
        optimiser.step()
        optimiser.zero_grad()
        done += 1
        if done == 0:  # the first one sets things up
            start = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return done * batch / (time.perf_counter() - start)


def table(found: dict[str, list[float]], workers: Sequence[int]) -> str:
    """In Markdown."""
    lines = [["read from", *(f"{count} workers" if count != 1 else "1 worker" for count in workers)]]
    lines += [["---"] * len(lines[0])]
    lines += [[kind, *(f"{rate:.0f}" for rate in rates)] for kind, rates in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(folder: Path, text: str) -> None:
    """Put the result into big-data.md of `folder`."""
    path = folder / "big-data.md"
    old = path.read_text(encoding="utf-8")
    if not BLOCK.search(old):
        raise LinsightError(f"'{path}' has no place for the table: '<!-- generated: reader -->'")
    write_text(path, BLOCK.sub(lambda found: f"{found[1]}{text}\n", old))


def measure(options: argparse.Namespace) -> str:
    """The table, with what it was measured with."""
    workers = [int(count) for count in options.workers.split(",")]
    size, sides = (options.size, options.size), tuple(map(int, options.sides.split("x")))
    with tempfile.TemporaryDirectory() as place:
        pictures = [picture(number, sides) for number in range(options.images)]
        opened = feeds(write(Path(place), pictures, options.shards), Path(place), size, options.batch)
        device = pick_device(options.device)
        model = linsight.create_model(options.model, num_classes=CLASSES, img_size=size).to(device).train()
        rates: dict[str, list[list[float]]] = {kind: [[] for _ in workers] for kind in opened}
        trained: list[float] = []
        for _ in range(options.rounds):
            trained.append(training(model, device, size, options.batch, options.seconds))
            for kind, opener in opened.items():
                for place_of, count in zip(rates[kind], workers, strict=True):
                    place_of.append(speed(opener(count), options.seconds))
    medians = {kind: [statistics.median(each) for each in found] for kind, found in rates.items()}
    kilobytes = statistics.mean(map(len, pictures)) / 1e3
    return (
        f"Images a second, {options.images} JPEG files of {options.sides} pixels, {kilobytes:.0f} kB each, cropped to "
        f"{options.size} pixels, batches of {options.batch}; median of {options.rounds} rounds. `{options.model}` "
        f"trains **{statistics.median(trained):.0f}** images a second in the same run ({device}, float32). "
        f"{platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}, linsight "
        f"{linsight.__version__}.\n\n{table(medians, workers)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--sides", default="500x375", help="width and height of the files")
    parser.add_argument("--size", type=int, default=224, help="side of what the model takes")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", default="0,1,2", help="numbers of worker processes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--model", default="inline_deit_tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--docs", type=Path, help="the folder of big-data.md, to write the result into")
    options = parser.parse_args(arguments)

    def work() -> None:
        text = measure(options)
        print(text)
        if options.docs:
            document(options.docs, text)

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
