"""The README's figures on CIFAR-10: InLine beside softmax, in the same host, by the same recipe and budget.

    python benchmarks/cifar10.py --data path/to/cifar10 --readme README.md
    python benchmarks/cifar10.py --data path/to/cifar10 --epochs 4

Both are trained by the recipe `cifar10`, one after the other, about an hour each on two CPU cores. A run in `--out`
that is finished is taken as it is, a stopped one goes on. Then both are timed side by side, in rounds that alternate
(let nothing else run meanwhile): a step of training on the batches that they were trained on, and a forward of one
image of 512 pixels.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _script import exit_status

import linsight.bench as room
from linsight.bench import Group, Plan, Setting, Subject
from linsight.errors import LinsightError
from linsight.runtime.console import new_console
from linsight.runtime.device import list_devices, pick_dtype
from linsight.runtime.files import write_text
from linsight.train import resolve, resume, train
from linsight.train.progress import reporter
from linsight.train.run import CONFIG

OURS, SOFTMAX = "inline_compact_tiny", "compact_tiny"
TIMES = (("train", (32, 32, 256)), ("infer", (512, 512, 1)))  # step; height, width, images at a time
BLOCK = re.compile(r"(<!-- results: cifar10 -->\n).*?(?=\n```bash)", re.DOTALL)
HEADER = (
    "CIFAR-10, 32 pixels",
    "parameters",
    "top-1 %",
    "training",
    "a step of training on 256",
    "one image of 512 pixels",
)


def learn(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """The summary of the finished run of a model."""
    folder, report = options.out / model, reporter(new_console())
    if (folder / CONFIG).exists():
        return resume(folder, report=report)
    given = {"model": model, "data": str(options.data), "threads": options.threads, "device": options.device}
    given |= {"epochs": options.epochs}
    return train(resolve("cifar10", given), out=folder, name=model, report=report)


def speeds(options: argparse.Namespace) -> list[tuple[float, float]]:
    """Milliseconds of ours and of softmax, for each of `TIMES`; forwards as `linsight eval` runs them."""
    group, found = Group((Subject("model", OURS),), Subject("model", SOFTMAX)), []
    for step, size in TIMES:
        setting = Setting(options.device, "auto", options.threads, options.seconds, fused=step == "infer")
        *_, done = room.bench(Plan((group,), (size,), setting, (step,)))
        ours, other = (float(row[f"{step}_step_time"]) for row in done.rows)
        found.append((ours, other))
    return found


def table(summaries: Sequence[dict[str, Any]], timed: Sequence[tuple[float, float]]) -> str:
    """In Markdown, ours first."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for place, summary in enumerate(summaries):
        times = [f"{pair[place]:.0f} ms" + ("" if place else f" ({pair[0] / pair[1]:.2f})") for pair in timed]
        name = f"`{summary['model']}` ({summary['attention']})"
        reached = [f"{summary['params'] / 1e6:.2f} M", f"{summary['top1']:.1f}", f"{summary['seconds'] / 60:.0f} min"]
        lines.append([name, *reached, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(summaries: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """What the figures are of."""
    precision = pick_dtype("auto", torch.device(options.device))[1]
    images, epochs = summaries[0]["train_images"], summaries[0]["epochs"]
    cpu = list_devices()[-1]["name"]
    return (
        f"JPEG copies of {images:,} images, {epochs} epochs, in {precision}; times on {options.threads} threads of "
        f"{cpu}. In brackets: the time beside softmax."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data/cifar10"), help="CIFAR-10, Parquet files or class folders")
    add("--out", type=Path, default=Path("runs/cifar10"), help="the folder of both runs")
    add("--epochs", type=int, default=resolve("cifar10").epochs)
    add("--device", default="cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--seconds", type=float, default=20.0, help="to spend on the rounds of a size")
    add("--readme", type=Path, help="the file to write the result into")
    options = parser.parse_args(arguments)
    if options.readme and not BLOCK.search(options.readme.read_text(encoding="utf-8")):
        raise LinsightError(f"'{options.readme}' has no place for the result: '<!-- results: cifar10 -->'")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""

    def work() -> None:
        options = parse(arguments)
        summaries = [learn(model, options) for model in (OURS, SOFTMAX)]
        text = f"{table(summaries, speeds(options))}\n\n{told(summaries, options)}\n"
        print(text)
        if options.readme:
            page = options.readme.read_text(encoding="utf-8")
            write_text(options.readme, BLOCK.sub(lambda found: found[1] + text, page))

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
