"""The published linear-attention models beside the same hosts with softmax: time, memory and size, as ratios.

    python benchmarks/hosts.py
    python benchmarks/hosts.py --models 'inline_*' --sizes 224:64,1024:4 --device cuda --amp bf16

Both models of a pair are measured in one process, in rounds that alternate between them, so that whatever slows
the machine slows both. What does not fit in time or memory, or is not there, is a line like the others. The table
goes to standard output, all numbers to a CSV file, with timm's names of columns where timm has one. It is
`linsight bench` on all published models, one pair at a time; that command measures any others.
"""

import argparse
import fnmatch
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from _script import exit_status

from linsight.bench import (
    STEPS,
    TIMM,
    Cell,
    Done,
    Group,
    Plan,
    Setting,
    Side,
    Subject,
    bench,
    check_plan,
    ratios,
    run_facts,
    softmax_beside,
    spread,
    write_rows,
)
from linsight.errors import UnknownNameError
from linsight.models import VARIANTS

# Of the table: a heading, and where its number comes from, for ours and for softmax.
COSTS = {"MB": ("peak_mb", ".0f"), "GMACs": ("gmacs", ".2f"), "M params": ("param_count", ".2f")}
HEADER = ("model", "beside it, with softmax", "pixels", "batch", "step", "rounds", "time ratio", "ms", "ms, softmax")
HEADER += tuple(f"{cost}{of}" for cost in COSTS for of in ("", ", softmax"))


def pairs() -> dict[str, str]:
    """The published variants of a linear mechanism, and for each the model with softmax on the same host."""
    found = {}
    for name, variant in VARIANTS.items():
        beside = softmax_beside(Subject("model", name))
        if variant.published and variant.attention != "softmax" and beside:
            found[name] = beside.name
    return found


def table_row(group: Group, cell: Cell, sides: dict[Subject, Side]) -> list[str]:
    """The cells of a pair in the order of `HEADER`."""
    ours, beside = group.sides
    both = sides[ours], sides[beside]
    made_by = f"timm {timm.__version__}" if beside.name in TIMM.values() else "ours: timm has none"
    found = ratios(*both)
    times = [spread([1000 * t for t in side.times], ".1f") if side.times else side.error for side in both]
    known = [(side.facts.get(key), form) for key, form in COSTS.values() for side in both]
    return [
        *(ours.name, f"{beside.name} ({made_by})", str(cell.height), str(cell.batch), STEPS[cell.step]),
        *(str(len(found)), spread(found, ".2f") if found else "-", *times),
        *("-" if value is None else format(value, form) for value, form in known),
    ]


def chosen(patterns: list[str], known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Names of models, or of none, with an error line."""
    for pattern in patterns:
        names = fnmatch.filter(known, pattern)
        if not names:
            yield pattern, str(UnknownNameError("model", pattern, known))
        yield from ((name, "") for name in names)


def show(cells: Iterable[str]) -> None:
    """A row of the table, at once: a run takes long."""
    print("|", " | ".join(cell.replace("|", "/") for cell in cells), "|", flush=True)


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 1 where a model was not there."""
    known, groups = pairs(), []
    rows: list[dict[str, Any]] = []
    for name, error in chosen(options.models, known):
        if error:
            rows.append({"model": name, "error": error})
        else:
            groups.append(Group((Subject("model", name),), Subject("model", known[name])))
    setting = Setting(options.device, options.amp, options.threads, options.seconds)
    sizes = tuple((size, size, batch) for size, batch in options.sizes)
    plan = check_plan(Plan(tuple(groups), sizes, setting, tuple(options.steps), options.limit))
    facts = run_facts(plan.setting)
    missing = len(rows)
    write_rows(options.csv, rows, facts)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print("\nms: of one step, median (lowest..highest); MB: the most that it takes beyond what was there before.")
    print("Time ratio: ours / softmax, over the rounds, likewise; below 1 is faster.\n")
    show(HEADER)
    show(["---"] * len(HEADER))
    for row in rows:
        show([row["model"], row["error"], *["-"] * (len(HEADER) - 2)])
    done: Done
    for done in bench(plan) if groups else ():
        show(table_row(done.group, done.cell, done.sides))
        write_rows(options.csv, [*rows, *done.rows], done.facts)
    return int(missing > 0)


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
        help="seconds for a model's first steps, or a later one: else it is given up",
    )
    add("--csv", type=Path, default=Path("hosts.csv"), help="file to write")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads must be 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    return exit_status(__file__, lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
