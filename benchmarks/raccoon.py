"""Detection from scratch on 160 photographs: the recipe `objects` on raccoons, beside a guess without a look.

    python benchmarks/raccoon.py --data path/to/raccoon --docs docs
    python benchmarks/raccoon.py --data path/to/raccoon --epochs 2

The run in --out that is finished is taken as it is, a stopped one goes on. Beside its average precision on the split
`val` stands that of the mean box of the training objects, in shares of height and width, as the only detection in each
image: what a detector has to beat to have seen anything. Both are by pycocotools. The split `val` chooses the epoch as
well, so what the last epoch reaches is told, too. --docs puts the table into detect.md.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _script import exit_status, put_picture
from torch import Tensor

from linsight.data.detection import Scene, open_objects
from linsight.data.images import Batch
from linsight.data.sources import Source
from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.console import new_console
from linsight.runtime.device import list_devices
from linsight.runtime.files import write_text
from linsight.tasks.coco_ap import AveragePrecision
from linsight.train import evaluate, load_trained, resolve, resume, train
from linsight.train.progress import reporter
from linsight.train.run import CONFIG

BLOCK = re.compile(r"(<!-- results: raccoon -->\n).*?(?=<!-- end: raccoon -->)", re.DOTALL)
HEADER = ("AP50 %", "AP %", "AP75 %", "parameters", "epochs", "minutes")
MEASURES = ("ap50", "ap", "ap75")


def mean_box(source: Source) -> Tensor:
    """The mean of all boxes of a source, x1, y1, x2, y2 as shares of the width and the height of their images."""
    found = []
    for index in range(len(source)):
        objects = source.beside(index).learned()
        height, width = objects.size
        found.append(objects.boxes / torch.tensor([width, height, width, height]))
    return torch.cat(found).mean(0)


def precision_of(box: Tensor, source: Source) -> dict[str, float]:
    """The measures of one box, in shares of the sides, in each image of a source of one class."""
    meter = AveragePrecision(source.classes)
    for index in range(len(source)):
        objects = source.beside(index)
        height, width = objects.size
        boxes = (box * torch.tensor([width, height, width, height]))[None]
        answer = {"boxes": boxes, "labels": torch.zeros(1, dtype=torch.long), "scores": torch.ones(1)}
        meter.update([answer], Batch(torch.empty(0), [Scene(index, objects.size, objects.size, objects)], []))
    return meter.compute()


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """The summary of the finished run, with its measures on `val`."""
    report = reporter(new_console())
    if (options.out / CONFIG).exists():
        summary = resume(options.out, report=report)
    else:
        given: dict[str, Any] = {"data": str(options.data), "device": options.device, "threads": options.threads}
        given |= {"amp": options.amp} | ({} if options.epochs is None else {"epochs": options.epochs})
        summary = train(resolve("objects", given), out=options.out, name="raccoon", report=report)
    return summary | evaluate(load_trained(options.out), device=options.device, amp=options.amp)


def table(ours: dict[str, Any], guess: dict[str, float]) -> str:
    """In Markdown. ours: what `learn` gives.  guess: measures of the mean box."""
    told = (f"{ours['params'] / 1e6:.2f} M", f"{ours['epochs']}", f"{ours['seconds'] / 60:.0f}")
    rows = [
        (f"{ours['images']} photographs of raccoons", *HEADER),
        ["---"] * (1 + len(HEADER)),
        ("the recipe `objects`", *(f"{ours[name]:.1f}" for name in MEASURES), *told),
        ("the mean box of the training set in each image", *(f"{guess[name]:.1f}" for name in MEASURES), "-", "-", "-"),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data/raccoon"), help="annotations/ and images/")
    add("--out", type=Path, default=Path("runs/raccoon"), help="the folder of the run")
    add("--epochs", type=int, help="none: those of the recipe")
    add("--device", default="cpu")
    add("--amp", default="auto", help=Recipe.help("amp"))
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--docs", type=Path, help="the folder of detect.md, the file to write the result into")
    options = parser.parse_args(arguments)
    if options.docs and not BLOCK.search((options.docs / "detect.md").read_text(encoding="utf-8")):
        raise LinsightError(f"'{options.docs / 'detect.md'}' has no place for the result: '<!-- results: raccoon -->'")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""

    def work() -> None:
        options = parse(arguments)
        data = open_objects(resolve("objects", {"data": str(options.data)}))
        guess = precision_of(mean_box(data.train), data.val)
        cpu = list_devices()[-1]["name"]
        ours = learn(options)
        chosen = f"Epoch {ours['best_epoch']}; after the last one AP is {ours['last_ap']:.1f} %."
        text = f"{table(ours, guess)}\n\n{chosen} On {options.threads} threads of {cpu}, amp={options.amp}.\n"
        print(text)
        if options.docs:
            page = options.docs / "detect.md"
            text += f"\n{put_picture(options.out / 'predictions.png', page)}\n"
            write_text(page, BLOCK.sub(lambda found: found[1] + text, page.read_text(encoding="utf-8")))

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
