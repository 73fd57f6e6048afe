"""The published linear-attention models beside the same hosts with softmax: time, memory and size, as ratios.

    python benchmarks/hosts.py
    python benchmarks/hosts.py --models 'inline_*' --sizes 224:64,1024:4 --device cuda --amp bf16

Both models of a pair are measured in one process, in rounds that alternate between them, so that whatever slows
the machine slows both. What does not fit in time or memory, or is not there, is a line like the others. The table
goes to standard output, all numbers to a CSV file, with timm's names of columns where timm has one.
"""

import argparse
import csv
import dataclasses
import fnmatch
import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from _cells import Send, Side, Worker, alternate, step_of
from torch import nn

import linsight
from linsight.describe import count_macs, count_parameters
from linsight.doctor import diagnose
from linsight.errors import LinsightError, UnknownNameError
from linsight.models import VARIANTS, create_model
from linsight.train._device import pick_device, pick_dtype

# Our hosts that timm has, by its names. The others stand for themselves, with softmax in them.
TIMM = {
    **{f"vit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")},
    **{f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")},
    "swin_base_384": "swin_base_patch4_window12_384",
    **{f"pvt_v2_b{size}": f"pvt_v2_b{size}" for size in range(6)},
}
STEPS = {"infer": "forward", "train": "training step"}
# Columns: of a model, and of each of its steps.
MODEL = ("model", "beside", "error", "param_count")
STEP = ("samples_per_sec", "step_time", "step_time_min", "step_time_max", "batch_size", "img_size", "gmacs")
STEP += ("peak_mb", "rounds", "ratio", "ratio_min", "ratio_max", "error")
# Of the table: a heading, and where its number comes from, for ours and for softmax.
COSTS = {"MB": ("peak_mb", ".0f"), "GMACs": ("gmacs", ".2f"), "M params": ("param_count", ".2f")}
HEADER = ("model", "beside it, with softmax", "pixels", "batch", "step", "rounds", "time ratio", "ms", "ms, softmax")
HEADER += tuple(f"{cost}{of}" for cost in COSTS for of in ("", ", softmax"))


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured of a pair of models: step "infer" or "train", on `batch` images of `size` x `size`."""

    step: str
    size: int
    batch: int
    device: str
    amp: str
    threads: int
    seconds: float


def pairs() -> dict[str, str]:
    """The published variants of a linear mechanism, and for each the model with softmax on the same host."""
    found = {}
    for name, variant in VARIANTS.items():
        host = variant.host.removesuffix("_meanpool")  # the head of one family's PVT, which has no name of its own
        if variant.published and variant.attention != "softmax" and not variant.dense:
            found[name] = TIMM.get(host, host)
    return found


def build(name: str, size: int, device: str | torch.device) -> nn.Module:
    """A model of ours or timm's with fresh weights, for images of `size`."""
    with torch.device(device):
        if name not in TIMM.values():
            return create_model(name, img_size=size)
        # PVTv2 takes any size, and so no argument; Swin's windows stay as they are
        return timm.create_model(name, **({} if name.startswith("pvt_v2") else {"img_size": size}))


@functools.cache
def cost(name: str, size: int) -> dict[str, float]:
    """Millions of parameters, and billions of multiply-adds for one image."""
    model = build(name, size, "meta").eval()
    macs = count_macs(model, torch.empty(1, 3, size, size, device="meta"))
    return {"param_count": round(count_parameters(model) / 1e6, 2), "gmacs": round(macs / 1e9, 2)}


def make(name: str, cell: Cell) -> tuple[dict[str, Any], Callable[[], None]]:
    """What a model costs, and the step to time."""
    facts = dict(cost(name, cell.size))
    device = torch.device(cell.device)
    dtype, _ = pick_dtype(cell.amp, device)
    torch.manual_seed(0)
    model = build(name, cell.size, device)
    return facts, step_of(model, cell.size, cell.batch, 1000, device, dtype, cell.step == "train")


def measure(cell: Cell, sides: dict[int, str], send: Send) -> None:
    """Runs in the process of a `Worker`."""
    torch.set_num_threads(cell.threads)
    alternate(sides, functools.partial(make, cell=cell), send, torch.device(cell.device), cell.seconds)


def ratios(ours: Side, theirs: Side) -> list[float]:
    """Of the time, one of each round that both have done."""
    return [a / b for a, b in zip(ours.times, theirs.times, strict=False)]


def spread(values: list[float], form: str) -> str:
    """`median (lowest..highest)`."""
    low, middle, high = (format(pick(values), form) for pick in (min, statistics.median, max))
    return f"{middle} ({low}..{high})"


def table_row(names: tuple[str, str], cell: Cell, sides: list[Side]) -> list[str]:
    """The cells of a pair in the order of `HEADER`."""
    ours, beside = names
    made_by = f"timm {timm.__version__}" if beside in TIMM.values() else "ours: timm has none"
    found = ratios(*sides)
    times = [spread([1000 * t for t in side.times], ".1f") if side.times else side.error for side in sides]
    known = [(side.facts.get(key), form) for key, form in COSTS.values() for side in sides]
    return [
        *(ours, f"{beside} ({made_by})", str(cell.size), str(cell.batch), STEPS[cell.step]),
        *(str(len(found)), spread(found, ".2f") if found else "-", *times),
        *("-" if value is None else format(value, form) for value, form in known),
    ]


def csv_columns(cell: Cell, side: Side, beside: Side | None) -> dict[str, Any]:
    """The columns of one step of a model; ratios where there is something `beside` it."""
    row = {"batch_size": cell.batch, "img_size": cell.size, "error": side.error, "rounds": len(side.times)}
    row |= {key: side.facts.get(key) for key in ("gmacs", "peak_mb")}
    if side.times:
        seconds = statistics.median(side.times)
        row |= {"samples_per_sec": cell.batch / seconds, "step_time": 1000 * seconds}
        row |= {"step_time_min": 1000 * min(side.times), "step_time_max": 1000 * max(side.times)}
    found = ratios(side, beside) if beside else []
    if found:
        row |= {"ratio": statistics.median(found), "ratio_min": min(found), "ratio_max": max(found)}
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    return {f"{cell.step}_{key}": value for key, value in rounded.items()}


def write(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """The CSV file, whole at any moment; `facts` hold for every row."""
    columns = [*MODEL, *(f"{step}_{key}" for step in STEPS for key in STEP), *facts]
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    os.replace(temporary, path)


def chosen(patterns: list[str], known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Names of models, with the one to put beside each, or with an error line where there is none."""
    for pattern in patterns:
        names = fnmatch.filter(known, pattern)
        if not names:
            yield pattern, str(UnknownNameError("model", pattern, known))
        yield from ((name, "") for name in names)


def show(cells: Iterable[str]) -> None:
    """A row of the table, at once: a run takes long."""
    print("|", " | ".join(cell.replace("|", "/") for cell in cells), "|", flush=True)


def measure_pair(worker: Worker, names: tuple[str, str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Show the rows of a pair; its columns for the CSV file, of one model and one size at a time."""
    for size, batch in options.sizes:
        columns: list[dict[str, Any]] = [{"model": a, "beside": b} for a, b in (names, names[::-1])]
        for step in options.steps:
            cell = Cell(step, size, batch, options.device, options.amp, options.threads, options.seconds)
            sides = worker.run(cell, names)
            show(table_row(names, cell, sides))
            for row, side, beside in zip(columns, sides, (sides[1], None), strict=True):
                row["param_count"] = side.facts.get("param_count")
                row |= csv_columns(cell, side, beside)
        yield from columns


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 where a model was not there."""
    device = pick_device(options.device)
    options.device = str(device)
    _, precision = pick_dtype(options.amp, device)
    name = next(row["name"] for row in diagnose()["devices"] if row["type"] == device.type)
    facts = {"device": f"{device}: {name}", "precision": precision, "threads": options.threads}
    facts |= {"torch": torch.__version__, "timm": timm.__version__, "linsight": linsight.__version__}
    known, missing = pairs(), 0
    rows: list[dict[str, Any]] = []
    write(options.csv, rows, facts)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print("\nms: of one step, median (lowest..highest); MB: the most that it takes beyond what was there before.")
    print("Time ratio: ours / softmax, over the rounds, likewise; below 1 is faster.\n")
    show(HEADER)
    show(["---"] * len(HEADER))
    with Worker(measure, options.limit) as worker:
        for model, error in chosen(options.models, known):
            if error:
                missing = 1
                rows.append({"model": model, "error": error})
                show([model, error, *["-"] * (len(HEADER) - 2)])
                write(options.csv, rows, facts)
            else:
                for row in measure_pair(worker, (model, known[model]), options):
                    rows.append(row)
                    write(options.csv, rows, facts)
    return missing


def sizes(text: str) -> list[tuple[int, int]]:
    return [(int(size), int(batch)) for size, batch in (part.split(":") for part in text.split(","))]


def steps(text: str) -> list[str]:
    if not set(text.split(",")) <= STEPS.keys():
        raise ValueError
    return text.split(",")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--models",
        type=lambda text: text.split(","),
        default="*_tiny,*_b0",
        help="names, also with *, of published variants",
    )
    add("--sizes", type=sizes, default="224:8,1024:1", help="pixels:batch, ...")
    add("--steps", type=steps, default="infer,train", help="infer, train or both")
    add("--device", default="cpu", help="cpu, cuda, mps ...")
    add("--amp", default="off", choices=("off", "auto", "bf16", "fp16"), help="mixed precision")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--seconds", type=float, default=20.0, help="to spend on the rounds of a cell; there are three at least")
    add(
        "--limit",
        type=float,
        default=100.0,
        help="seconds for a model's first step, or a later one: else it is given up",
    )
    add("--csv", type=Path, default=Path("hosts.csv"), help="file to write")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        return run(parse(arguments))
    except (LinsightError, OSError) as error:
        print(f"hosts.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
