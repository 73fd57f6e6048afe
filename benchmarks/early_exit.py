"""Dynamic Perceiver on CIFAR-10: accuracy against the operations and the time that leaving early saves.

    python benchmarks/early_exit.py
    python benchmarks/early_exit.py --epochs 30 --device cuda --docs docs

A small model is trained (or the run in --run is taken, and gone on with if it was stopped); the best weights are those
of 5000 images held out of the training set. Half of the 10,000 test images then set thresholds and choose settings, and
the other half is what is reported. Operations are counted by running the model's parts on the meta device, not assumed.
The images a second are those of the staged forward, on whole batches: who is sure leaves, the others go on. All
policies are timed in rounds that alternate between them. --docs puts the table and the plot into early-exit.md there.
"""

import argparse
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import linsight
from linsight.errors import LinsightError
from linsight.runtime.console import new_console
from linsight.runtime.device import autocast
from linsight.train import Trained, evaluate_exits, load_trained, resolve, resume, train
from linsight.train.evaluation import prepare
from linsight.train.model import WEIGHTS
from linsight.train.progress import reporter
from linsight.train.run import CONFIG

MODEL = "dynp_resnet18_025_t32_cifar"
TRAINING = {"model": MODEL, "val_split": "train[45000:]", "workers": 0}
BUDGETS = (0.6, 0.7, 0.8, 0.9)  # of what the last exit costs
BLOCK = re.compile(r"(<!-- generated: early exit -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEADER = ("leaving", "T1", "T2", "T3", "% at exit 1", "2", "3", "4", "MMACs", "top-1 %", "images/s")


def learn(options: argparse.Namespace) -> Trained:
    """The trained model: a finished run as it is, a stopped one gone on with, or a new one."""
    if not (options.run / WEIGHTS).exists() or not (options.run / "summary.json").exists():
        if (options.run / CONFIG).exists():
            resume(options.run, overrides={}, report=reporter(new_console()))
        else:
            given = {"data": str(options.data), "epochs": options.epochs, "device": options.device, "amp": options.amp}
            given |= {"train_split": f"train[:{options.subset}]", "warmup_epochs": min(2, options.epochs - 1)}
            recipe = resolve("cifar10", {**TRAINING, **given})
            train(recipe, out=options.run, name="early-exit", report=reporter(new_console()))
    return load_trained(options.run)


def policies(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each exit alone; and for each budget the setting that is right most often where it was calibrated."""
    last = found["exits"][-1]["gmacs"]
    chosen = {row["setting"]: row for row in found["exits"]}
    for share in BUDGETS:
        fitting = [row for row in found["settings"] if row["calibration"]["gmacs"] <= share * last]
        if fitting:
            best = max(fitting, key=lambda row: (row["calibration"]["top1"], -row["calibration"]["gmacs"]))
            chosen[f"when sure, at most {100 * share:.0f} % of exit 4 ({best['setting']})"] = best
    return chosen


def speeds(trained: Trained, rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[float]:
    """Images a second of each policy: the median of some rounds over the same batches of test images."""
    workers = 0 if options.device in ("auto", "cpu") else None
    given = prepare(trained, None, "test", options.batch, options.device, options.amp, workers, "skip", None)
    model: Any = given.model.eval()
    inputs: Any = given.task.inputs  # what the task does with uint8 images
    batches = [inputs(batch.images) for _, batch in zip(range(options.batches), given.feed, strict=False)]
    images = sum(map(len, batches))

    def seconds(row: dict[str, Any]) -> float:
        thresholds = [float("inf") if least is None else least for least in row["thresholds"]]
        start = time.perf_counter()
        for batch in batches:
            model.predict(batch, thresholds).exits.tolist()  # which waits for the device
        return time.perf_counter() - start

    times: list[list[float]] = [[] for _ in rows]
    with torch.inference_mode(), autocast(inputs.device, given.dtype):
        for number in range(options.rounds + 1):
            for i in sorted(range(len(rows)), reverse=bool(number % 2)):
                times[i].append(seconds(rows[i]))
    return [images / statistics.median(taken[1:]) for taken in times]  # the very first round sets things up


def table(chosen: dict[str, dict[str, Any]], rates: Sequence[float]) -> str:
    """In Markdown."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for (name, row), rate in zip(chosen.items(), rates, strict=True):
        levels = ["-" if least is None else f"{least:.3f}" for least in row["thresholds"]]
        shares = [f"{100 * share:.1f}" for share in row["shares"]]
        lines.append([name, *levels, *shares, f"{1e3 * row['gmacs']:.2f}", f"{row['top1']:.2f}", f"{rate:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(found: dict[str, Any], options: argparse.Namespace) -> str:
    """What the figures were taken with."""
    counts = found["images"]
    machine = torch.cuda.get_device_name() if found["device"].startswith("cuda") else platform.machine()
    versions = f"torch {torch.__version__}, timm {timm.__version__}, linsight {linsight.__version__}"
    return (
        f"`{MODEL}`, {options.epochs} epochs of {options.subset} images; {counts['calibration']} test images set "
        f"thresholds, {counts['report']} others are reported on. Speed at batch {options.batch}: "
        f"{found['device']} ({machine}, {torch.get_num_threads()} threads), {found['precision']}; {versions}."
    )


def document(folder: Path, text: str, run: Path) -> None:
    """Put the result into early-exit.md of `folder`, and the plot beside it."""
    path = folder / "early-exit.md"
    old = path.read_text(encoding="utf-8")
    if not BLOCK.search(old):
        raise LinsightError(f"'{path}' has no place for the table: '<!-- generated: early exit -->'")
    path.write_text(BLOCK.sub(lambda found: f"{found[1]}{text}\n\n![](early-exit.png)\n", old), encoding="utf-8")
    (folder / "early-exit.png").write_bytes((run / "exits.png").read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"), help="CIFAR-10 as Parquet files")
    parser.add_argument("--run", type=Path, default=Path("runs/early-exit"), help="the run: made, or taken as it is")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--subset", type=int, default=45000, help="training images, the first ones")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--batch", type=int, default=128, help="images at a time, when timed")
    parser.add_argument("--batches", type=int, default=8, help="batches that a round times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--docs", type=Path, help="the folder of early-exit.md, to write the result into")
    options = parser.parse_args(arguments)
    try:
        trained = learn(options)
        found = evaluate_exits(trained, split="test", device=options.device, amp=options.amp, workers=0)
        chosen = policies(found)
        text = f"{about(found, options)}\n\n{table(chosen, speeds(trained, list(chosen.values()), options))}"
        print(text)
        if options.docs:
            document(options.docs, text, options.run)
    except LinsightError as error:
        print(f"early_exit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
