"""`python ranks.py FOLDER CASE ...`: runs made by several processes, forked from one that has imported everything.

FOLDER has `data`, a folder of class folders, `masks` and `boxes`, squares to segment and to find.
It prints one JSON: by case, the exit code of each process.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from small import MASKS, OBJECTS, TINY

from linsight.errors import LinsightError
from linsight.runtime.signals import Interrupted
from linsight.train import resolve, resume, train
from linsight.train.progress import Silent

# Half of the time of a batch norm; stochastic depth, whose draws are those of a part.
NORMS = {**TINY, "model": "compact_pico", "model_args": ""}
DROPS = {**TINY, "drop_path": 0.3}
FULL = {"batch_size": 12, "lr": 2e-3, "mixup": 0.5, "cutmix": 0.5, "ema": 0.8, "clip_grad": 1.0, "weight_decay": 0.05}
PLAIN = {**FULL, "mixup": 0.0, "cutmix": 0.0, "batch_size": 7}

WHOLE = {"resize": "1,1", "img_size": "24,32", "model_args": MASKS["model_args"] + ",dropout=0"}

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")

# By name: what one process does, and what several do in its place, by their number.
CASES = {
    "norms": ({**NORMS, **FULL}, {2: {}, 4: {}}),
    "sharded": ({**NORMS, **FULL}, {2: {"parallel": "fsdp"}, 4: {"parallel": "fsdp"}}),
    "drops": ({**DROPS, **FULL, "accumulate": 2}, {2: {"accumulate": 1}}),
    "parts": ({**DROPS, **FULL, "accumulate": 4}, {2: {"accumulate": 2}, 4: {"accumulate": 1}}),
    "sharded parts": ({**DROPS, **FULL, "accumulate": 4}, {2: {"accumulate": 2, "parallel": "fsdp"}}),
    "bands": ({**TINY, **FULL}, {2: {"image_ranks": 2}, 4: {"image_ranks": 2}}),
    "odd": ({**TINY, **PLAIN}, {2: {}, 4: {"parallel": "fsdp"}}),
    "distil": ({**TINY, **FULL, "task": "distil", "distil_kind": "features"}, {2: {}, 3: {"parallel": "fsdp"}}),
    # Whole images, of as many pixels with a class each: the mean over pixels is of a process, that over images of all.
    "masks": ({**MASKS, "epochs": 2, "batch_size": 5, "ema": 0.8, "opt": "sgd", **WHOLE}, {2: {}}),
    # One stage: others draw regions to learn from, in each process its own.
    "boxes": ({**OBJECTS, "epochs": 2, "batch_size": 5, "ema": 0.8, "method": "retinanet"}, {2: {}}),
    "muon": ({**TINY, **FULL, "opt": "muon"}, {2: {"parallel": "fsdp"}}),
}


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def fork(world, act, errors, slurm=False):
    """Processes that a launcher might have started, each of which does something; their numbers, by rank."""
    port, found = free_port(), []
    for rank in range(world):
        number = os.fork()
        if number == 0:
            code = 1
            try:
                sys.stderr = (errors.with_name(f"{errors.name}-{rank}")).open("w")
                if world > 1:
                    values = zip(SLURM if slurm else TORCHRUN, (rank, world, rank, world), strict=True)
                    os.environ |= {name: str(value) for name, value in values}
                    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
                act()
                code = 0
            except SystemExit as ended:
                code = ended.code or 0
            except Interrupted as stopped:
                print(stopped, file=sys.stderr)
                code = stopped.code
            except LinsightError as error:
                print(error, file=sys.stderr)
                code = 2
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        found.append(number)
    return found


def codes(numbers):
    return [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]


def after_a_loss(numbers, patience=10):
    """The exit codes where some may have been killed: as by a launcher, those are ended that go on to wait for them.

    One that is killed before the others have met it leaves them waiting for half an hour, as torch does.
    """
    found, began = {}, time.perf_counter()
    while len(found) < len(numbers):
        for number in set(numbers) - found.keys():
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                found[number] = os.waitstatus_to_exitcode(status)
            elif -signal.SIGKILL in found.values() and time.perf_counter() - began > patience:
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)
    return [found[number] for number in numbers]


def run(folder, name, world, values, **settings):
    """Train by `values`; the exit codes."""
    data = {"segment": "masks", "detect": "boxes"}.get(values.get("task"), "data")
    recipe = {"data": str(folder / data), "seed": 5, **values, **settings}
    act = lambda: train(resolve("digits", recipe), out=folder / name)  # noqa: E731
    return codes(fork(world, act, folder / f"{name}.err"))


def elastic(folder):
    """A run of one process that two take up in its middle, and three of them sharded; then one again."""
    base = {**TINY, **FULL, "epochs": 4}
    found = {"whole": run(folder, "whole", 1, base)}
    numbers = fork(1, lambda: stop_after(folder, base), folder / "elastic.err")
    found["begun"] = codes(numbers)
    for name, world, settings in (
        ("two", 2, {}),
        ("sharded", 3, {"parallel": "fsdp"}),
        ("one", 1, {"parallel": "ddp"}),
    ):
        last = name == "one"
        act = lambda: go_on(folder, settings, last)  # noqa: B023, E731
        found[name] = codes(fork(world, act, folder / f"elastic-{name}.err"))
    return found


class Stopping(Silent):
    """Asks its process to stop after some steps."""

    def __init__(self, steps):
        self.left = steps

    def step(self, *args):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_after(folder, values):
    recipe = {"data": str(folder / "data"), "seed": 5, **values}
    train(resolve("digits", recipe), out=folder / "elastic", report=Stopping(3))


def go_on(folder, settings, last):
    resume(folder / "elastic", overrides=settings, report=None if last else Stopping(3))


def killed(folder, world, kills):
    """A run that is begun by one command and killed at random moments, one of its processes or all; then ended."""
    values = {**TINY, **FULL, "epochs": 6, "save_every": 1, "keep_states": 2, "seed": 5, "data": str(folder / "data")}
    name, draw = f"killed-{world}", random.Random(world)
    errors = folder / f"{name}.err"

    def act():
        train(resolve("digits", values), out=folder / name, go_on=True)

    found = {"whole": run(folder, f"{name}-whole", 1, values), "killed": 0, "ended": 0, "others": [], "states": []}
    began = time.perf_counter()
    found["first"] = codes(fork(world, lambda: train(resolve("digits", values), out=folder / f"{name}-time"), errors))
    whole = time.perf_counter() - began
    while found["killed"] < kills:
        numbers = fork(world, act, errors)
        time.sleep(draw.uniform(0.1, 1.0) * whole)
        some = numbers if draw.random() < 0.5 else [draw.choice(numbers)]
        for number in some:
            os.kill(number, signal.SIGKILL)
        ended = after_a_loss(numbers)
        if -signal.SIGKILL in ended:
            found["killed"] += 1
            found["others"] += [code for code in ended if code != -signal.SIGKILL]
        else:  # it was quicker
            found["ended"] += 1
        if (folder / name / "state.pt").exists():  # is whole, whenever
            found["states"].append(torch.load(folder / name / "state.pt", weights_only=True)["epoch"])
        if (folder / name / "summary.json").exists():
            shutil.rmtree(folder / name)
    found["last"] = codes(fork(world, act, errors))
    return found


def refused(folder):
    """Runs whose batch is too small for their processes."""
    found = {}
    for name, values in (("norms", {**NORMS, "batch_size": 3}), ("few", {**TINY, "batch_size": 1})):
        codes_of = run(folder, f"refused-{name}", 2, values)
        found[name] = [codes_of, (folder / f"refused-{name}.err-0").read_text()]
    return found


def guest(folder):
    """A run in processes whose caller has joined them: they stay so."""

    def act():
        torch.distributed.init_process_group("gloo")
        train(resolve("digits", {**TINY, "data": str(folder / "data"), "epochs": 1}), out=folder / "guest")
        torch.distributed.barrier()

    return codes(fork(2, act, folder / "guest.err"))


def main(folder, names):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        if name == "elastic":
            found[name] = elastic(folder)
            continue
        if name in ("refused", "guest"):
            found[name] = globals()[name](folder)
            continue
        if name.startswith("killed"):
            found[name] = killed(folder, *map(int, name.split("-")[1:]))
            continue
        case, _, world = name.rpartition("-")
        values, several = CASES[case]
        if values.get("task") == "distil":
            if not (folder / "teacher").exists():
                run(folder, "teacher", 1, {**TINY, "model_args": TINY["model_args"].replace("16", "24")})
            values = {**values, "teacher": str(folder / "teacher")}
        if (folder / f"{case}-1").exists():
            shutil.rmtree(folder / f"{case}-1")
        found[name] = {"1": run(folder, f"{case}-1", 1, values)}
        found[name][world] = run(folder, name, int(world), values, **several[int(world)])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
