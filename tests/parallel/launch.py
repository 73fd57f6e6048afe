"""`python launch.py FOLDER` runs the cases over ranks: one process imports everything, and forks them.

Each rank leaves `RUN-RANK.json` in the folder: for each case that it ran nothing, or what went wrong.
"""

import datetime
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from parallel import faults, hosts, layers, training


class Run(NamedTuple):
    """Cases of so many ranks, which wait so many seconds for each other; some are to die."""

    ranks: int
    timeout: float
    cases: dict[str, Callable[[], None]]
    dead: frozenset[int] = frozenset()


def harder(cases):
    """Without layers of which there is also a case with prefix tokens."""
    return {name: case for name, case in cases.items() if f"{name} prefix" not in cases}


# One mechanism of a kind: two ranks have fewer neighbours and nothing else that four do not have.
KINDS = [
    f"layer {name}{prefix}" for name in ("inline", "agent", "focused", "ttt", "yoso") for prefix in ("", " prefix")
]
FEW = [*KINDS, "layer mlla", "layer atconv", "one gather a round"]
FEW += ["host vit_tiny", "host pvt_tiny", "host mlla_pyramid_tiny"]
RUNS = {
    "two": Run(2, 200, {name: {**layers.CASES, **hosts.CASES}[name] for name in FEW}),
    "four": Run(4, 200, {**harder(layers.CASES), **hosts.CASES, **training.CASES, **faults.CASES}),
    "dying": Run(4, 5, faults.DYING, frozenset({2})),
    "dying-later": Run(4, 5, faults.DYING_LATER, frozenset({2})),
}


def be(rank, run, folder):
    world, timeout, cases, _ = RUNS[run]
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP's, of class tokens
    store = dist.FileStore(str(folder / f"{run}-store"), world)
    timeout = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    found = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case()
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
            break  # others may wait for what never comes: nothing after it can be trusted
    (folder / f"{run}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def main(folder, names):
    torch.set_num_threads(1)
    for run in names or RUNS:
        children = []
        for rank in range(RUNS[run].ranks):
            child = os.fork()
            if not child:
                try:
                    be(rank, run, folder)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
