"""Linear backbones beside timm's Swin-T and ResNet-50 in the same dense tasks: time and memory, forward and training.

    python benchmarks/dense_speed.py --docs docs
    python benchmarks/dense_speed.py --parts segment --sides 512,1024 --quick

Three parts: the backbone alone, a segmenter (the decoder `mlp`, 150 classes) and a detector (Faster R-CNN, 80 classes),
each of one image and with fresh weights, on which times do not depend but for boxes: a detector looks at the best
thousand regions. The Swin-T is timm's in linsight's host, with windows of 7 tokens at any size. All backbones of a cell
(a part, a step and a size) are measured in one process, in rounds that alternate between them; a training step is one
of AdamW. At --streamed pixels images go through the segmenter in tiles, which is for hosts that can. What fails or does
not fit is told in its place. A finished cell is in --csv at once and is not measured again: a run that was stopped goes
on. --docs puts the tables into dense.md there.
"""

import argparse
import csv
import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _script import exit_status
from torch import Tensor, nn
from torch.nn import functional as F

import linsight
from linsight.bench import STEPS, Send, Setting, Side, Step, Worker, alternate, ratios, run_facts, write_rows
from linsight.bench.rows import digits
from linsight.errors import LinsightError, UnknownNameError
from linsight.models.dense import create_detector, create_segmenter, pyramid
from linsight.runtime.device import autocast, pick_device, pick_dtype
from linsight.runtime.files import write_text

SWIN, RESNET = "timm/swin_tiny_patch4_window7_224", "timm/resnet50"
OURS = ("inline_swin_tiny", "agent_swin_tiny", "mlla_tiny")
PARTS = {
    "backbone": "The backbone alone: maps at strides 4 to 32",
    "segment": "A segmenter, `mlp`, 150 classes",
    "detect": "A detector, `faster_rcnn`, 80 classes",
}
WAYS = {**STEPS, "stream": "in tiles"}
CLASSES, KINDS, OBJECTS = 150, 80, 8  # of pixels, of objects, and objects in an image that is learned
WHAT = ("part", "step", "side", "model")
NOTED = ("params", "ms", "ms_min", "ms_max", "ratio", "ratio_min", "ratio_max", "peak_mb", "rounds", "error")
FACTS = ("device", "precision", "threads", "date", "torch", "timm", "linsight")
SAME = ("device", "precision", "threads")  # of rows that stand in one table
BLOCK = re.compile(r"(<!-- results: dense -->\n).*?(?=<!-- end: dense -->)", re.DOTALL)


class Cell(NamedTuple):
    """What is measured in the same rounds: all models in a part, by a step of `WAYS`, of images of `side` pixels."""

    part: str
    step: str
    side: int
    tile: int
    setting: Setting


def measure(cell: Cell, sides: dict[int, str], send: Send) -> None:
    """In the process of a `Worker`: the sides are names of backbones."""
    setting = cell.setting
    torch.set_num_threads(setting.threads)
    alternate(sides, functools.partial(make, cell=cell), send, torch.device(setting.device), setting.seconds)


def make(name: str, cell: Cell) -> tuple[dict[str, Any], Step]:
    """The facts of a model, and the step to time."""
    torch.manual_seed(0)
    device = torch.device(cell.setting.device)
    dtype, _ = pick_dtype(cell.setting.amp, device)
    model = build(cell.part, name).to(device)
    facts = {"params": sum(parameter.numel() for parameter in model.parameters())}
    if cell.step == "stream":
        return facts, streaming(model.eval(), cell)
    images = torch.randn(1, 3, cell.side, cell.side, device=device)
    if cell.step == "train":
        return facts, training(model.train(), loss_of(cell.part, images), device, dtype)
    model.eval()

    def infer() -> None:
        with torch.inference_mode(), autocast(device, dtype):
            model(images)

    return facts, infer


def build(part: str, name: str) -> nn.Module:
    if part == "backbone":
        return pyramid(name)
    if part == "segment":
        return create_segmenter(name, "mlp", CLASSES)
    return create_detector(name, "faster_rcnn", num_classes=KINDS)


def streaming(model: nn.Module, cell: Cell) -> Step:
    pixels = np.random.default_rng(0).integers(0, 255, (cell.side, cell.side, 3), dtype=np.uint8)
    return lambda: linsight.stream(model, pixels, output="mask", tile=cell.tile)


def training(model: nn.Module, loss: Callable[[nn.Module], Tensor], device: torch.device, dtype: Any) -> Step:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def update() -> None:
        with autocast(device, dtype):
            found = loss(model)
        optimiser.zero_grad(set_to_none=True)
        found.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return update


def loss_of(part: str, images: Tensor) -> Callable[[Any], Tensor]:
    """The loss of a model of a part on images with a random truth."""
    side, device = images.shape[-1], images.device
    if part == "backbone":
        return lambda model: sum((m.float().square().mean() for m in model(images)), torch.zeros((), device=device))
    if part == "segment":
        classes = torch.randint(CLASSES, (1, side, side), device=device)
        return lambda model: F.cross_entropy(model(images).main.float(), classes)
    corners = torch.rand(OBJECTS, 2, device=device) * side / 2
    boxes = torch.cat([corners, corners + side / 8 + torch.rand(OBJECTS, 2, device=device) * side / 4], 1)
    target = {"boxes": boxes, "labels": torch.randint(KINDS, (OBJECTS,), device=device)}
    return lambda model: sum(model(images, [target]).values(), torch.zeros((), device=device))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """All, from small to large."""
    setting = Setting(options.device, options.amp, options.threads, options.seconds)
    for side in options.sides:
        for part in options.parts:
            for step in options.steps:
                if step != "train" or side <= options.train_up_to:
                    yield Cell(part, step, side, options.tile, setting)
    if options.streamed and "segment" in options.parts:
        yield Cell("segment", "stream", options.streamed, options.tile, setting)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is not in the CSV file yet, and return all rows."""
    options.device = str(pick_device(options.device))
    facts = run_facts(Setting(options.device, options.amp, options.threads))
    facts = {key: facts[key] for key in FACTS}
    rows = read(options.csv, facts)
    names = [*options.models, *options.beside]
    with Worker(measure, options.limit) as worker:
        for cell in cells(options):
            known = {row["model"] for row in rows if tuple(row[key] for key in WHAT[:3]) == cell[:3]}
            if known >= set(names):
                continue
            rows = [row for row in rows if tuple(row[key] for key in WHAT[:3]) != cell[:3]]
            found = dict(zip(names, worker.run(cell, names), strict=True))
            for name, side in found.items():
                row = dict(zip(WHAT, (*cell[:3], name), strict=True)) | numbers(side, found[options.beside[0]]) | facts
                rows.append(row)
                print(
                    ", ".join(f"{key} {row[key]}" for key in (*WHAT, *NOTED) if row[key] not in ("", None)), flush=True
                )
            write_rows(options.csv, rows, {}, (*WHAT, *NOTED, *FACTS))
    return rows


def numbers(side: Side, beside: Side) -> dict[str, Any]:
    """The columns `NOTED` of a model, beside another one."""
    row: dict[str, Any] = dict.fromkeys(NOTED, "")
    row |= {key: side.facts.get(key) or "" for key in ("params", "peak_mb")}
    row |= {"rounds": len(side.times), "error": side.error}
    shares = ratios(side, beside) if side is not beside else []
    for key, values in (("ms", [1000 * time for time in side.times]), ("ratio", shares)):
        if values:
            low, middle, high = min(values), float(np.median(values)), max(values)
            row |= {key: round(middle, 4), f"{key}_min": round(low, 4), f"{key}_max": round(high, 4)}
    return row


def read(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run before, if there was one here.

    Raises:
        LinsightError: they are of something else, or of another machine or precision.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    if rows and set(rows[0]) != {*WHAT, *NOTED, *FACTS}:
        raise LinsightError(f"'{path}' is no file of this script: name another with --csv")
    for row in rows:
        row["side"] = int(row["side"])
        other = [key for key in SAME if row[key] != str(facts[key])]
        if other:
            raise LinsightError(f"'{path}' has rows of {other[0]} {row[other[0]]}: name another file with --csv")
        row |= {key: float(row[key]) for key in NOTED if key != "error" and row[key]}
    return rows


def text_of(rows: Sequence[dict[str, Any]], command: str) -> str:
    """In Markdown: a table for each part and step."""
    facts = ", ".join(f"{key} {rows[0][key]}" for key in FACTS)
    text = [f"```bash\n{command}\n```", facts, ABOUT]
    for part, title in PARTS.items():
        for step, words in WAYS.items():
            found = [row for row in rows if (row["part"], row["step"]) == (part, step)]
            if found:
                text += [f"### {title}, {words}", table(found)]
    return "\n\n".join(text) + "\n"


ABOUT = (
    "Milliseconds of one image, the median of the rounds; in brackets the ratio to Swin-T, below 1 where it is "
    "quicker; and the megabytes that a step takes at most beyond what was there before."
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    sides, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("side", "model"))
    found = {(row["model"], row["side"]): row for row in rows}
    lines = [["", "M params", *(f"{side:,} pixels" for side in sides)], ["---"] * (2 + len(sides))]
    for name in names:
        own = [found.get((name, side), {}) for side in sides]
        params = next((float(row["params"]) for row in own if row.get("params")), 0.0)
        lines.append([f"`{name}`", f"{params / 1e6:.1f}" if params else "-", *map(shown, own)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(row: dict[str, Any]) -> str:
    if not row or not row["ms"]:
        return str(row.get("error") or "-").replace("|", "/")
    ratio = f" ({float(row['ratio']):.2f})" if row["ratio"] else ""
    memory = f", {digits(float(row['peak_mb']))} MB" if row["peak_mb"] else ""
    return f"{digits(float(row['ms']))}{ratio}{memory}"


def listed(text: str) -> list[str]:
    return text.split(",")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=listed, default=[*OURS], help="backbones of linsight")
    add("--beside", type=listed, default=[SWIN, RESNET], help="what they are put beside; ratios are to the first")
    add("--parts", type=listed, default=[*PARTS], help=", ".join(PARTS))
    add("--steps", type=listed, default=[*STEPS], help="infer, train or both")
    add("--sides", type=lambda text: [*map(int, listed(text))], default=[512, 1024, 2048], help="pixels, by commas")
    add("--train-up-to", type=int, default=1024, help="pixels; larger images are not trained on")
    add("--streamed", type=int, default=4096, help="side of the image that is segmented in tiles; 0: none")
    add("--tile", type=int, default=1024, help="pixels of a tile's side")
    add("--device", default="cpu")
    add("--amp", default="off", choices=("off", "auto", "bf16", "fp16"), help="mixed precision")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--seconds", type=float, default=10.0, help="to spend on the rounds of a cell; there are three at least")
    add("--limit", type=float, default=400.0, help="seconds for the first steps of a model, or a later one")
    add("--quick", action="store_true", help="a try: 128 pixels, 256 in tiles of 128, three rounds each")
    add("--csv", type=Path, default=Path("dense_speed.csv"), help="file to write, and to go on with")
    add("--docs", type=Path, help="the folder of dense.md, to write the result into")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    if options.quick:
        options.sides, options.streamed, options.tile, options.seconds = [128], 256 * bool(options.streamed), 128, 0.0
    for kind, names, known in (("part", options.parts, PARTS), ("step", options.steps, STEPS)):
        for name in names:
            if name not in known:
                raise UnknownNameError(kind, name, known)
    for name in (*options.models, *options.beside):
        with torch.device("meta"):  # refuses what is no backbone, before anything is measured
            pyramid(name)
    if "train" in options.steps and min(options.sides) > options.train_up_to:
        raise LinsightError(f"no side of {options.sides} is trained on: --train-up-to is {options.train_up_to}")
    page = options.docs and options.docs / "dense.md"
    if page and not (page.exists() and BLOCK.search(page.read_text(encoding="utf-8"))):
        raise LinsightError(f"'{page}' is not there, or has no place for the result: '<!-- results: dense -->'")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""

    def work() -> None:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        rows = run(options)
        text = text_of(rows, shlex.join(["python", "benchmarks/dense_speed.py", *options.arguments]))
        print(text)
        if options.docs:
            page = options.docs / "dense.md"
            write_text(page, BLOCK.sub(lambda found: found[1] + text, page.read_text(encoding="utf-8")))

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
