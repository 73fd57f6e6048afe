"""A softmax ViT trained on CIFAR-10, and what mechanisms win back of it within a twentieth of its training.

    python benchmarks/linearize.py --data path/to/cifar10 --docs docs
    python benchmarks/linearize.py --data path/to/cifar10 --epochs 4 --seeds 1 --only hedgehog,mean

The teacher, a small transformer behind convolutions, is trained by the recipe `cifar10`. Then each mechanism, for each
seed, by the task `linearize`: a quarter of its budget for its layers one by one, the rest for the whole model. Beside
them are the controls: `mean`, attention that is the mean of the values, and the same budget from scratch, of softmax
and of `linear`. Last, the teacher and some students of the first seed go on at twice the resolution, and are timed
there and above; and the last of these sees one image of --side pixels in tiles, in a process of its own that holds
--limit of memory at most. Runs in `--out` that are finished are taken as they are, and each accuracy is a line of
`--csv` at once, so it may be stopped at any time; times are measured at the end. --docs puts the tables and a picture
into linearize.md there.
"""

import argparse
import csv
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from _script import exit_status
from gigapixel import Watch

import linsight
from linsight.bench import Send, Setting, Worker, run_speed
from linsight.errors import LinsightError
from linsight.runtime.console import new_console
from linsight.runtime.device import list_devices, pick_device, pick_dtype
from linsight.runtime.figures import drawing, new_figure, require_matplotlib, save_figure
from linsight.runtime.files import replacing, write_text
from linsight.train import load_trained, resolve, resume, train
from linsight.train.progress import reporter
from linsight.train.run import CONFIG

MODEL = {"model": "compact_nano", "model_args": "stem=((48,2),),stages=((96,4,3),)"}
PATCH = 4  # pixels of a token's side
STUDENTS = ("hedgehog", "inline", "t5", "focused", "mlla", "rala", "mean")
SCRATCH = ("softmax", "linear")
LARGER = ("softmax", "hedgehog", "inline")  # that go on at `SIDE`, softmax as the teacher
SIDE, TIMED, TILE = 64, (64, 128, 256), 256  # pixels
SHARE = 0.05  # of the teacher's updates
WANTED = 0.97  # of the teacher's top-1
DRAWN = "linearize-vision.png"  # the picture, beside the page
BATCH, IMAGES, AT_SIDE = 128, 50_000, 6_400  # images of a batch, to train on, and to go on with
FIELDS = ("kind", "attention", "seed", "updates", "top1", "teacher", "seconds")
Run = tuple[str, str, int]  # kind, mechanism and seed
BLOCK = re.compile(r"(<!-- results: vision -->\n).*?(?=<!-- end: vision -->)", re.DOTALL)


def learn(folder: Path, recipe: str, given: dict[str, Any], *, shown: bool = True) -> dict[str, Any]:
    """The summary of the finished run in a folder."""
    report = reporter(new_console()) if shown else None
    if (folder / CONFIG).exists():
        return resume(folder, report=report)
    return train(resolve(recipe, given), out=folder, name=folder.name, report=report)


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Each run beside the teacher."""
    for seed in range(options.seeds):
        for kind, names in (("student", STUDENTS), ("scratch", SCRATCH)):
            yield from ((kind, name, seed) for name in names if not options.only or name in options.only)
    yield from (("larger", name, 0) for name in LARGER if not options.only or name in (*options.only, "softmax"))


def results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of `FIELDS` for each run, those in the file first."""
    rows: list[dict[str, Any]] = []
    if options.csv.exists():
        with options.csv.open(newline="") as file:
            rows = list(csv.DictReader(file))
    shared = {"data": str(options.data), "device": options.device, "threads": options.threads, "batch_size": BATCH}
    shared["workers"] = options.workers
    done = {(row["kind"], row["attention"], int(row["seed"])) for row in rows}
    todo = [run for run in runs(options) if run not in done]
    if not todo:
        return rows
    teacher = options.out / "teacher"
    told = learn(teacher, "cifar10", {**shared, **MODEL, **augmented(options), "attention": "softmax"})
    updates = int(SHARE * options.epochs * (IMAGES // BATCH))
    for _, stage in groupby(todo, key=lambda run: run[0] == "larger"):  # these go on from the others
        for run, found in learned({run: asked(run, updates, shared, options) for run in stage}, options.jobs):
            rows.append(outcome(run, found, told, updates))
            with replacing(options.csv) as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
    return rows


def learned(tasks: dict[Run, tuple[Any, ...]], jobs: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run and its summary as it is finished. tasks: what `learn` takes, of each. jobs: processes, if above one."""
    if jobs == 1:
        yield from ((run, learn(*task)) for run, task in tasks.items())
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        waiting = {pool.submit(learn, *task, shown=False): run for run, task in tasks.items()}
        try:
            yield from ((waiting[future], future.result()) for future in as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)  # after a run that failed no other is begun


def asked(
    run: Run, updates: int, shared: dict[str, Any], options: argparse.Namespace
) -> tuple[Path, str, dict[str, Any]]:
    """Folder, recipe and fields of a run beside the teacher."""
    kind, name, seed = run
    # one epoch of as many images as the budget has left
    given: dict[str, Any] = {**shared, "seed": seed, "epochs": 1, "warmup_epochs": 0, "channels_last": True}
    given["threads"] = max(options.threads // options.jobs, 1)
    if kind == "student":
        alone = 0 if name == "mean" else updates // 4
        given |= {"task": "linearize", "teacher": str(options.out / "teacher"), "attention": name}
        given |= {"transfer_steps": alone, "epoch_images": (updates - alone) * BATCH}
        given |= {"lr": "2e-3", "opt": "adamw", "weight_decay": 0, "new_lr_scale": 1}
    elif kind == "scratch":
        given |= {**MODEL, **augmented(options), "epochs": 1, "attention": name, "epoch_images": updates * BATCH}
    else:
        given |= {"init": str(started(options.out, name)), "img_size": SIDE, "epoch_images": AT_SIDE}
        given |= {"lr": "2e-4", "opt": "adamw", "layer_decay": 1}
    return options.out / f"{kind}-{name}-{seed}", "cifar10" if kind == "scratch" else "finetune", given


def outcome(run: Run, found: dict[str, Any], teacher: dict[str, Any], updates: int) -> dict[str, Any]:
    """`FIELDS` of a finished run."""
    kind, name, seed = run
    return {
        "kind": kind,
        "attention": name,
        "seed": seed,
        "updates": AT_SIDE // BATCH if kind == "larger" else updates,
        "top1": f"{found['last_top1']:.2f}",
        "teacher": f"{teacher['last_top1']:.2f}",
        "seconds": f"{found['seconds']:.0f}",
    }


def started(out: Path, name: str) -> Path:
    """The run that goes on at twice the resolution."""
    return out / ("teacher" if name == "softmax" else f"student-{name}-0")


def augmented(options: argparse.Namespace) -> dict[str, Any]:
    """The teacher's fields beyond those of the recipe."""
    return {
        "epochs": options.epochs,
        "mixup_prob": 0.0,
        "cutmix": 0.0,
        "opt": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
    }


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Top-1 of the seeds of each student and control, by what it is called, the best first."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] != "larger":
            name = row["attention"]
            more = ", from scratch" if row["kind"] == "scratch" else ", the control" if name == "mean" else ""
            found.setdefault(name + more, []).append(float(row["top1"]))
    return dict(sorted(found.items(), key=lambda item: -mean(item[1])))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: mean and spread of the seeds, and the share of the teacher."""
    lines = ["| attention | top-1 % | of the teacher's |", "|---|---|---|"]
    teacher = float(rows[0]["teacher"])
    lines.append(f"| softmax, the teacher | {teacher:.1f} | |")
    for label, values in groups(rows).items():
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| {label} | {mean(values):.1f}{spread} | {100 * mean(values) / teacher:.1f} % |")
    return "\n".join(lines)


@drawing()
def picture(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Each seed a dot, the mean a bar, beside lines at the teacher and at `WANTED` of it."""
    found, teacher = groups(rows), float(rows[0]["teacher"])
    figure = new_figure(8, 1.2 + 0.3 * len(found))
    axes = figure.subplots()
    for place, (label, values) in enumerate(found.items()):
        colour = "tab:gray" if "," in label else "tab:blue"
        axes.plot(values, [place] * len(values), ".", color=colour, alpha=0.6)
        axes.plot(mean(values), place, "|", color=colour, markersize=14)
    for share, style in ((1.0, "-"), (WANTED, ":")):
        axes.axvline(
            share * teacher, color="tab:red", linestyle=style, linewidth=1, label=f"{share:.0%} of the teacher"
        )
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set(xlabel="top-1 %, each seed and the mean")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def larger(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """In Markdown: top-1 at twice the resolution, and the time of a forward beside softmax, there and above."""
    setting = Setting(options.device, "auto", options.threads, options.seconds)
    top1 = {row["attention"]: float(row["top1"]) for row in rows if row["kind"] == "larger"}
    names, beside, cells = sorted(top1, key=LARGER.index), list[list[float]](), dict[str, list[str]]()
    for name in names[1:]:
        timed = run_speed(started(options.out, name), [(side, side) for side in TIMED], setting)
        times = [float(one.get("infer_step_time") or "nan") for one in timed]  # where one could not be run
        beside.append(times[1::2])
        cells[name] = [
            f"{ours:.1f} ({ours / softmax:.2f})" for ours, softmax in zip(times[::2], beside[-1], strict=True)
        ]
    cells["softmax"] = [f"{mean(times):.1f}" for times in zip(*beside, strict=True)] or [""] * len(TIMED)
    sizes = [f"{side} pixels, ms (ratio)" for side in TIMED]
    lines = [f"| attention | top-1 % at {SIDE} pixels | {' | '.join(sizes)} |", "|---" * (2 + len(sizes)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {top1[name]:.1f} | {' | '.join(cells[name])} |" for name in names)])


def measure(asked: tuple[Path, int, int, float, int], sides: dict[int, str], send: Send) -> None:
    """In a process of its own: a run in tiles. asked: scratch folder, side, tile, limit in bytes (0: none), threads."""
    folder, side, tile, limit, threads = asked
    torch.set_num_threads(threads)
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    for place, run in sides.items():
        trained = load_trained(run)
        model, shown = trained.model.eval(), {"mean": trained.recipe.mean, "std": trained.recipe.std}
        mean, std = (torch.tensor(shown[key]).view(3, 1, 1) for key in ("mean", "std"))
        corner = pixels[: 2 * tile, : 2 * tile]
        with torch.inference_mode():
            whole = model(((torch.from_numpy(corner).permute(2, 0, 1) / 255 - mean) / std)[None])
            off = (linsight.stream(model, corner, tile=tile, **shown) - whole).abs().max() / whole.abs().max()
            with Watch(folder) as watch:
                begun = time.perf_counter()
                linsight.stream(model, pixels, tile=tile, scratch=folder, **shown)
                seconds = time.perf_counter() - begun
        send(place, "facts", {"seconds": seconds, "off": float(off), **watch.facts()})


def streamed(options: argparse.Namespace) -> str:
    """A sentence on an image that softmax has no memory for."""
    name = LARGER[-1]
    with tempfile.TemporaryDirectory() as folder, Worker(measure, 3600.0) as worker:
        asked = (Path(folder), options.side, TILE, options.limit * 1e9, options.threads)
        (found,) = worker.run(asked, [str(options.out / f"larger-{name}-0")])
    if found.error or not found.facts:
        raise LinsightError(f"'{name}' was not streamed: {found.error or 'the process ended'}")
    facts, tokens = found.facts, (options.side // PATCH) ** 2
    return (
        f"`{name}` at {options.side:,} x {options.side:,} pixels, {tokens:,} tokens, in tiles of {TILE}: "
        f"{facts['seconds']:.0f} s, {facts['anon_mb']:,.0f} MB of memory under a limit of {options.limit:g} GB, and "
        f"{facts['scratch_gb']:.1f} GB of files. At {2 * TILE} pixels logits differ from those of the whole image by "
        f"{facts['off']:.0e} of the largest."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data/cifar10"), help="CIFAR-10, Parquet files or class folders")
    add("--out", type=Path, default=Path("runs/linearize"), help="the folder of all runs")
    add("--csv", type=Path, default=Path("runs/linearize.csv"), help="the results")
    add("--epochs", type=int, default=16, help="of the teacher")
    add("--seeds", type=int, default=3)
    add("--only", type=lambda text: text.split(","), default=[], help="some of the mechanisms")
    add("--device", default="cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--jobs", type=int, default=1, help="runs after the teacher's that are trained at once, each with its threads")
    add("--workers", type=int, help="processes that read images; none: as the recipe has it")
    add("--seconds", type=float, default=5.0, help="to spend on the times of a size")
    add("--side", type=int, default=4096, help="pixels of the image that is seen in tiles")
    add("--limit", type=float, default=4.0, help="of memory then, in GB; 0: none")
    add("--docs", type=Path, help="the folder of linearize.md, the file to write the result into")
    options = parser.parse_args(arguments)
    if options.docs:
        require_matplotlib(f"drawing {DRAWN}")
    if options.docs and not BLOCK.search((options.docs / "linearize.md").read_text(encoding="utf-8")):
        raise LinsightError(
            f"'{options.docs / 'linearize.md'}' has no place for the result: '<!-- results: vision -->'"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""

    def work() -> None:
        options = parse(arguments)
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        rows = results(options)
        told = (
            f"{rows[0]['updates']} updates of {BATCH} images, a twentieth of the teacher's, {options.seeds} seeds, "
            f"on {list_devices()[-1]['name']}."
        )
        beyond = (
            f"The teacher and students of the first seed, each trained on {AT_SIDE:,} images of {SIDE} pixels more; "
            f"times of one image in {pick_dtype('auto', pick_device(options.device))[1]} on {options.threads} threads, "
            "and beside softmax in the same host."
        )
        text = f"{table(rows)}\n\n{told}\n\n![of the teacher]({DRAWN})\n\n{larger(rows, options)}\n\n{beyond}\n"
        text += "" if options.only else f"\n{streamed(options)}\n"
        print(text)
        if options.docs:
            picture(options.docs / DRAWN, rows)
            page = options.docs / "linearize.md"
            write_text(page, BLOCK.sub(lambda found: found[1] + text, page.read_text(encoding="utf-8")))

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
