"""`python launch.py FOLDER` runs the cases over ranks: one process imports everything, and forks them.

Each rank leaves `RUN-RANK.json` in the folder: for each case that it ran nothing, or what went wrong.
"""

import datetime
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from parallel import hosts, layers

CASES = {**layers.CASES, **hosts.CASES}
RUNS = {"two": (2, 40.0, CASES), "four": (4, 40.0, CASES)}  # ranks, seconds that one waits for another, and what


def be(rank, run, folder):
    world, timeout, cases = RUNS[run]
    warnings.simplefilter("error")
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
        for rank in range(RUNS[run][0]):
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
