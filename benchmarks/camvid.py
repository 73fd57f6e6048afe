"""Segmentation from scratch on CamVid: InLine beside softmax in the same host, and beside a ResNet, by one budget.

    python benchmarks/camvid.py --data path/to/camvid --docs docs
    python benchmarks/camvid.py --data path/to/camvid --minutes 5

Each is trained by the recipe `masks` for as many epochs as fit into --minutes of this machine, by the time of its first
updates, with the decoder and all else the same; the schedule ends there. A run in `--out` that is finished is taken as
it is, a stopped one goes on. The split `val` chooses the epoch, the test split is what is told. Let nothing else run
meanwhile. --docs puts the table into segment.md there, and the picture of predictions beside it.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _script import exit_status, put_picture

from linsight.data.feeds import open_feeds
from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.console import new_console
from linsight.runtime.device import list_devices, pick_device, pick_dtype
from linsight.runtime.files import write_text
from linsight.tasks import task_of
from linsight.train import evaluate, load_trained, resolve, resume, train
from linsight.train.learner import Learner
from linsight.train.progress import reporter
from linsight.train.run import CONFIG

IGNORE = 11  # of CamVid's masks
MODELS: dict[str, dict[str, Any]] = {
    "inline": {},
    "softmax": {"attention": "softmax"},
    "resnet18": {"model": "timm/resnet18", "attention": None, "model_args": {}},
}
BLOCK = re.compile(r"(<!-- results: camvid -->\n).*?(?=<!-- end: camvid -->)", re.DOTALL)
HEADER = ("CamVid, test split", "parameters", "mIoU %", "pixel accuracy %", "epochs", "minutes")
_TIMED = 12  # updates, the first third of which is not counted


def seconds_of_epoch(recipe: Recipe) -> float:
    """How long an epoch of a recipe takes here, by a few updates."""
    task = task_of(recipe)
    data, device = task.open(), pick_device(recipe.device)
    model = task.build()
    size = (recipe.img_size * 2)[:2]
    feeds = open_feeds(recipe.changed(cache="off"), data, task, size, device, lambda line: None)
    learner = Learner(task, model, device, pick_dtype(recipe.amp, device)[0], updates=len(feeds.order))
    batches, started = iter(feeds.train), 0.0
    for place in range(_TIMED):
        if place == _TIMED // 3:
            started = time.perf_counter()
        found = learner.loss(next(batches), 0)
        assert found is not None
        learner.backward(found[0])
        learner.step(place)
    return (time.perf_counter() - started) / (_TIMED - _TIMED // 3) * len(feeds.order)


def learn(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the finished run of a model reaches on the test split."""
    folder, report = options.out / name, reporter(new_console())
    if (folder / CONFIG).exists():
        summary = resume(folder, report=report)
    else:
        given = {"data": str(options.data), "ignore": IGNORE, "device": options.device, "threads": options.threads}
        recipe = resolve("masks", {**given, "amp": options.amp, **MODELS[name]})
        epochs = max(int(60 * options.minutes / (seconds_of_epoch(recipe) * 1.1)), 1)
        print(f"{name}: {epochs} epochs")
        summary = train(recipe.changed(epochs=epochs), out=folder, name=name, report=report)
    return summary | {f"test_{key}": value for key, value in evaluate(load_trained(folder), split="test").items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown, ours first."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for name, row in zip(MODELS, rows, strict=True):
        told = (f"{row['params'] / 1e6:.2f} M", f"{row['test_miou']:.1f}", f"{row['test_pixels']:.1f}")
        lines.append((name, *told, f"{row['epochs']}", f"{row['seconds'] / 60:.0f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data/camvid"), help="images/ and masks/, with splits in them")
    add("--out", type=Path, default=Path("runs/camvid"), help="the folder of all runs")
    add("--minutes", type=float, default=28.0, help="of training, for each; 2 cores make twice as many CPU minutes")
    add("--device", default="cpu")
    add("--amp", default="auto", help=Recipe.help("amp"))
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--docs", type=Path, help="the folder of segment.md, the file to write the result into")
    options = parser.parse_args(arguments)
    if options.docs and not BLOCK.search((options.docs / "segment.md").read_text(encoding="utf-8")):
        raise LinsightError(f"'{options.docs / 'segment.md'}' has no place for the result: '<!-- results: camvid -->'")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""

    def work() -> None:
        options = parse(arguments)
        rows = [learn(name, options) for name in MODELS]
        cpu = list_devices()[-1]["name"]
        told = (
            f"{options.minutes:g} minutes of training each, on {options.threads} threads of {cpu}, amp={options.amp}."
        )
        text = f"{table(rows)}\n\n{told}\n"
        print(text)
        if options.docs:
            page = options.docs / "segment.md"
            text += f"\n{put_picture(options.out / 'inline' / 'predictions.png', page)}\n"
            write_text(page, BLOCK.sub(lambda found: found[1] + text, page.read_text(encoding="utf-8")))

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
