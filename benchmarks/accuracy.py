"""Every mechanism in one small host, trained alike: accuracy over seeds, size, operations, speed.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --place cifar10,recall-4,recall-8,recall-16,recall-64 --limit 1200
    python benchmarks/accuracy.py --epochs 30 --subset 50000 --device cuda --amp bf16

A place (`--place`, see `_places.py`) is a host, images and a budget: CIFAR-10 on 8x8 tokens, and a task that needs
mixing over the whole grid, of up to 64x64 tokens. The host is the compact one, whose MLP has a convolution in it, so
that no mechanism is the only one to know where a token is. It takes whole blocks as well as layers; a mechanism is what
is registered, with its default options, but for forms of the same function that train sooner (`FORMS`). Nothing is
tuned for any of them. A run is done with linsight's own trainer; each one that ends is a row of the CSV file, and is
not done again: stop it and go on at any time. A mechanism goes through all places with one seed before the next
mechanism does. What diverges, or does not fit in time or memory, is a row like the others. At the end all models are
timed in rounds that alternate between them. The rows so far come with linsight, which reads them for `linsight advise
--accuracy`: go on with `--csv src/linsight/bench/accuracy.csv`.
"""

import argparse
import collections
import concurrent.futures
import csv
import dataclasses
import fnmatch
import functools
import hashlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import _accuracy_docs as docs
import timm
import torch
from _places import PLACES, Place, place
from _script import exit_status
from torch import nn

import linsight
from linsight.attention import list_attentions
from linsight.bench import TOO_LONG, Send, Worker, alternate, step_of, write_rows
from linsight.bench.counting import count_macs, count_parameters
from linsight.doctor import diagnose
from linsight.errors import LinsightError, UnknownNameError
from linsight.models import create_model
from linsight.runtime.device import pick_device, pick_dtype
from linsight.train import Interrupted, Recipe, resolve, train

BATCH = 64
# On top of the recipe cifar10, below what a place has of its own. AdamW, as in all of the papers.
TRAINING: dict[str, Any] = {"model": "compact_nano", "batch_size": BATCH, "re_prob": 0.0, "opt": "adamw"}
TRAINING |= {"lr": 2e-3, "weight_decay": 0.05, "warmup_epochs": 1, "clip_grad": 1.0}
TRAINING |= {"channels_last": False, "workers": 0, "figures": False}
# A form of the same function and the same gradients, for at most so many tokens, that trains sooner.
FORMS: dict[str, tuple[int, dict[str, Any]]] = {"yoso": (256, {"form": "pairs"})}
SPEEDS = {"infer": "forward_images_per_second", "train": "training_images_per_second"}
COLUMNS = (
    "place",
    "mechanism",
    "kind",
    "seed",
    "budget",
    "top1",
    "seconds",
    "error",
    "params",
    "mmacs",
    *SPEEDS.values(),
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs at a place share.

    runs: the folder of runs that others go on from.  start: of the place that runs here go on from.
    """

    place: str
    data: str
    epochs: int
    subset: int
    test: int
    device: str
    amp: str
    threads: int
    seconds: float
    runs: str
    start: "Setting | None" = None

    @property
    def budget(self) -> str:
        """What a row's accuracy was reached with."""
        here, *before = self.line()
        text = f"{here.epochs} epochs of {here.subset} images, {here.test} to evaluate"
        return text + "".join(f", after {at.epochs} epochs of {at.subset} at {at.place}" for at in before)

    def line(self) -> "Iterator[Setting]":
        """This one, what its runs go on from, what those go on from, and so on."""
        at: Setting | None = self
        while at is not None:
            yield at
            at = at.start

    def folder(self, mechanism: str, seed: int | str) -> Path:
        """The folder of a run that others go on from, which tells all that its weights depend on."""
        told = sorted(recipe(self, mechanism, int(seed)).model_dump(exclude={"threads"}).items())
        return Path(
            self.runs, f"{self.place}-{mechanism}-{seed}-{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"
        )


Run = tuple[str, int, Setting]  # a mechanism, a seed, and where


def form(mechanism: str, at: Place) -> dict[str, dict[str, Any]]:
    """The options of a mechanism that has a form for as few tokens, none for others."""
    tokens, options = FORMS.get(mechanism, (0, {}))
    return {"attention_options": options} if at.grid**2 <= tokens else {}


def recipe(setting: Setting, mechanism: str, seed: int) -> Recipe:
    """How each run is done."""
    at = place(setting.place)
    given = {
        "img_size": at.side,
        "model_args": dict(at.host),
        **at.recipe,
        "attention": mechanism,
        **form(mechanism, at),
        "seed": seed,
        "data": setting.data,
        "train_split": f"train[:{setting.subset}]",
        "val_split": f"test[:{setting.test}]",
        "epochs": setting.epochs,
        "warmup_epochs": min(TRAINING["warmup_epochs"], setting.epochs - 1),
        "device": setting.device,
        "amp": setting.amp,
        "threads": setting.threads,
    }
    if setting.start is not None:
        given["init"] = str(setting.start.folder(mechanism, seed))
    return resolve("cifar10", {**TRAINING, **given})


def build(mechanism: str, at: Place, device: str | torch.device) -> nn.Module:
    """The model of a run, with fresh weights."""
    options = {**form(mechanism, at), "img_size": at.side, "num_classes": at.classes, **at.host}
    with torch.device(device):
        return create_model("compact_nano", attention=mechanism, **options)


def work(cell: tuple[str, Setting], sides: dict[int, str], send: Send) -> None:
    """Runs in the process of a `Worker`: trainings, each of a side called `mechanism seed`; or all sides timed by turns
    in a step of `SPEEDS`.
    """
    what, setting = cell
    if what == "run":
        for side, name in sides.items():
            learn(setting, side, *name.split(), send)
        return
    torch.set_num_threads(setting.threads)
    timed = functools.partial(make, step=what, setting=setting)
    alternate(sides, timed, send, torch.device(setting.device), setting.seconds)


def learn(setting: Setting, side: int, mechanism: str, seed: str, send: Send) -> None:
    """Train, and send the accuracy of the last weights, on which nothing was selected."""
    try:
        summary = keep(setting, mechanism, seed)
        send(side, "facts", {"top1": summary["last_top1"], "seconds": summary["seconds"]})
    except Interrupted:
        raise KeyboardInterrupt from None
    except Exception as error:  # of whatever kind: it is what there is to report
        send(side, "error", (str(error).strip() or type(error).__name__).splitlines()[0][:200])


def keep(setting: Setting, mechanism: str, seed: str) -> dict[str, Any]:
    """The summary of a run, which is kept where others go on from it; first is made what it goes on from."""
    if setting.start is not None and not setting.start.folder(mechanism, seed).exists():
        keep(setting.start, mechanism, seed)
    kept = setting.folder(mechanism, seed)
    followed = any(at.after == setting.place for at in PLACES.values())
    if followed:
        Path(setting.runs).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=setting.runs if followed else None) as folder:
        run = Path(folder, "run")
        summary = train(recipe(setting, mechanism, int(seed)), out=run)
        if followed:
            shutil.rmtree(kept, ignore_errors=True)
            run.rename(kept)
    return summary


def make(mechanism: str, step: str, setting: Setting) -> tuple[dict[str, Any], Callable[[], None]]:
    """No facts, and the step to time, on random images."""
    device = torch.device(setting.device)
    dtype, _ = pick_dtype(setting.amp, device)
    at = place(setting.place)
    return {}, step_of(build(mechanism, at, device), at.side, BATCH, at.classes, device, dtype, step == "train")


def chosen(patterns: list[str]) -> dict[str, str]:
    """The mechanisms that match, and what kind each is."""
    known = {entry.name: entry.kind for entry in list_attentions()}
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise UnknownNameError("mechanism", pattern, known)
    return {name: kind for name, kind in known.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file of ours, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and not rows[0].keys() >= set(COLUMNS):
        raise LinsightError(f"'{path}' is no file of this benchmark: name another with --csv")
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The CSV file, whole at any moment."""
    columns = list(dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)]))
    write_rows(path, rows, {}, columns)


def train_all(
    workers: list[Worker], units: Iterable[list[Run]], slow: dict[tuple[str, str], str]
) -> Iterator[dict[str, Any]]:
    """The columns of each run as it ends, as many side by side as there are workers.

    units: the runs of a mechanism and a seed, which one worker does in a row, as some go on from others.
    slow: places and mechanisms that took too long with one seed, and that seed's error; others are not tried.
    """
    waiting, idle = collections.deque(units), list(workers)
    going: dict[concurrent.futures.Future[dict[str, Any]], tuple[Worker, list[Run]]] = {}
    pool = concurrent.futures.ThreadPoolExecutor(len(workers))

    def begin(worker: Worker, unit: list[Run]) -> None:
        going[pool.submit(train_one, worker, unit[0], slow)] = worker, unit[1:]

    try:
        while waiting or going:
            while waiting and idle:
                begin(idle.pop(), waiting.popleft())
            for future in concurrent.futures.wait(going, return_when="FIRST_COMPLETED").done:
                worker, others = going.pop(future)
                yield future.result()
                if others:
                    begin(worker, others)
                else:
                    idle.append(worker)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def train_one(worker: Worker, run: Run, slow: dict[tuple[str, str], str]) -> dict[str, Any]:
    """The columns of one run, also of one that is not tried."""
    mechanism, seed, setting = run
    row = {"place": setting.place, "mechanism": mechanism, "seed": seed}
    for at in setting.line():
        if (at.place, mechanism) in slow:
            return row | {"error": f"not tried: {slow[at.place, mechanism]}"}
    (side,) = worker.run(("run", setting), [f"{mechanism} {seed}"])
    if side.error.startswith(TOO_LONG):
        slow[setting.place, mechanism] = told_slow(row | {"error": side.error})
    return row | {"error": side.error, **side.facts}


def told_slow(row: Mapping[str, Any]) -> str:
    """What took too long, as the reason not to try it with other seeds."""
    return f"seed {row['seed']} {row['error']} at {row['place']}"


def time_all(worker: Worker, setting: Setting, names: list[str]) -> dict[str, dict[str, float]]:
    """Images a second of each mechanism, by column."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for step, column in SPEEDS.items():
        for name, side in zip(names, worker.run((step, setting), names), strict=True):
            found[name][column] = round(docs.median(BATCH / seconds for seconds in side.times), 1)
    return found


def size(mechanism: str, at: Place) -> dict[str, float]:
    """Parameters, and millions of multiply-adds for one image."""
    model = build(mechanism, at, "meta").eval()
    macs = count_macs(model, torch.empty(1, 3, at.side, at.side, device="meta"))
    return {"params": count_parameters(model), "mmacs": round(macs / 1e6, 2)}


def setting_of(options: argparse.Namespace, name: str, device: torch.device) -> Setting:
    """The budget of a place, with what is given in place of it."""
    at = place(name)
    shared = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Setting)}
    budget = {key: getattr(options, key) or getattr(at, key) for key in ("epochs", "subset", "test")}
    made = dataclasses.replace(at, **budget)  # what is made, is made for it
    own = {"place": name, "data": str(made.data(options.data)), "device": str(device), "runs": str(options.runs)}
    return Setting(**{**shared, **budget, **own, "start": setting_of(options, at.after, device) if at.after else None})


def run(options: argparse.Namespace) -> None:
    """Train what has no row yet, time all, and write."""
    device = pick_device(options.device)
    _, precision = pick_dtype(options.amp, device)
    machine = next(row["name"] for row in diagnose()["devices"] if row["type"] == device.type)
    facts = {"device": f"{device}: {machine}", "precision": precision, "threads": options.threads, "jobs": options.jobs}
    facts |= {"torch": torch.__version__, "timm": timm.__version__, "linsight": linsight.__version__}
    kinds = chosen(options.only)
    settings = [setting_of(options, name, device) for name in options.place]
    rows = read(options.csv)
    write(options.csv, rows)  # before hours are spent, in case it can't be written
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    workers = [Worker(work, options.limit) for _ in range(options.jobs)]
    try:
        if not options.as_it_is:
            fill(rows, settings, kinds, facts, workers, options)
        shown = {place(setting.place): at_place(rows, setting, facts, kinds) for setting in settings}
        for setting, ours in zip(settings, shown.values(), strict=True):
            if options.seconds:
                speeds = time_all(workers[0], setting, list(kinds))
                for row in ours:
                    row |= speeds[row["mechanism"]] | {"speed_device": facts["device"]}
                write(options.csv, rows)
    finally:
        for worker in workers:
            if worker.process is not None:
                worker.process.kill()
    for at, ours in shown.items():
        print(f"\n{at.about}\n\n{docs.table(ours)}")
    if options.docs:
        docs.write(options.docs, shown, sys.argv[1:])


def comparable(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What rows have in common whose accuracies compare; which processor of a kind it was does not matter."""
    return (row["place"], row["budget"], row["device"].partition(":")[0], row["precision"])


def at_place(
    rows: list[dict[str, Any]], setting: Setting, facts: dict[str, Any], kinds: dict[str, str]
) -> list[dict[str, Any]]:
    """The rows of one place that compare with those of this machine."""
    here = comparable({"place": setting.place, "budget": setting.budget, **facts})
    return [row for row in rows if comparable(row) == here and row["mechanism"] in kinds]


def fill(
    rows: list[dict[str, Any]],
    settings: list[Setting],
    kinds: dict[str, str],
    facts: dict[str, Any],
    workers: list[Worker],
    options: argparse.Namespace,
) -> None:
    """Do the runs that have no row, and add these to `rows` and to the file."""
    done, slow, budgets = set(), {}, {}
    for setting in settings:
        ours = at_place(rows, setting, facts, kinds)
        done |= {(row["mechanism"], int(row["seed"]), setting) for row in ours}
        late = [row for row in ours if row["error"].startswith(TOO_LONG)]
        slow |= {(setting.place, row["mechanism"]): told_slow(row) for row in late}
        budgets[setting.place] = setting.budget
        todo = len(options.seeds) * len(kinds) - sum(int(row["seed"]) in options.seeds for row in ours)
        print(f"{setting.place}, {setting.budget}: {todo} runs to do, {len(ours)} done before", flush=True)
    units = [
        [run for setting in settings if (run := (name, seed, setting)) not in done]
        for seed in options.seeds
        for name in kinds
    ]
    for row in train_all(workers, filter(None, units), slow):
        at = row["place"]
        row |= {"kind": kinds[row["mechanism"]], "budget": budgets[at], **size(row["mechanism"], place(at)), **facts}
        rows.append(row)
        write(options.csv, rows)
        result = row["error"] or f"{row['top1']:.2f} % in {row['seconds']:.0f} s"
        print(f"{at}, {row['mechanism']}, seed {row['seed']}: {result}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--place", type=lambda text: text.split(","), default="cifar10", help=f"where: {', '.join(PLACES)}")
    add("--data", type=Path, help="a folder of Parquet files with the splits train and test, in place of the place's")
    add("--only", type=lambda text: text.split(","), default="*", help="names of mechanisms, also with *")
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], default="0,1,2")
    add("--epochs", type=int, help="of which the first is for warming up; those and the next two: as the place has it")
    add("--subset", type=int, help="images to train on, the first ones")
    add("--test", type=int, help="images to evaluate on, the first ones")
    add("--jobs", type=int, default=2, help="runs side by side")
    add("--threads", type=int, default=1, help="of the CPU, for each run and for timing")
    add("--device", default="cpu", help="cpu, cuda, mps ...")
    add("--amp", default="off", choices=("off", "auto", "bf16", "fp16"), help="mixed precision")
    add("--seconds", type=float, default=60.0, help="to time all forwards, and all training steps; 0: not at all")
    add("--limit", type=float, default=3600.0, help="seconds for a run: else it is given up")
    add("--csv", type=Path, default=Path("accuracy.csv"), help="file to add to")
    add(
        "--runs",
        type=Path,
        default=Path("runs/accuracy"),
        help="folder of the runs that those of other places go on from",
    )
    add("--as-it-is", action="store_true", help="train nothing more: show the rows that there are")
    add(
        "--docs",
        type=Path,
        help="folder whose accuracy.md is to show the result, with a picture of each place beside it",
    )
    options = parser.parse_args(arguments)
    for name in ("epochs", "subset", "test", "jobs", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    for name in options.place:
        place(name)
    return options


def main(arguments: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or the workers would train on
    return exit_status(__file__, lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
