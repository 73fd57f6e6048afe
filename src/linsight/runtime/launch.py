"""How this process was started: alone, or as one of many by a launcher."""

import os
import pathlib
import sys
from collections.abc import Mapping
from typing import NamedTuple

from linsight.errors import LinsightError

# What launchers call the number of a copy, how many there are, and the same on this machine. A job of SLURM has tasks
# before `srun` starts them, so its own numbers are not among these.
_RANKS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


class Copy(NamedTuple):
    """One process of several that a launcher started: its number of all, and of those on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


ALONE = Copy()


def this_copy(environment: Mapping[str, str] = os.environ) -> Copy:
    """Which of several copies this process is, as the environment says; alone where it says nothing."""
    for names in _RANKS:
        given = [environment.get(name, "") for name in names]
        if all(text.isdigit() for text in given[:2]):
            rank, world = map(int, given[:2])
            local = int(given[2]) if given[2].isdigit() else rank
            copies = int(given[3]) if given[3].isdigit() else 1
            if rank < world:
                return Copy(rank, world, local, max(1, copies))
    return Copy()


def require_rank(environment: Mapping[str, str] = os.environ) -> None:
    """Raise where this process is one of several copies, and nothing says which: all would do the same work.

    Raises:
        LinsightError: a variable of the environment says so.
    """
    for _, count, *_ in _RANKS:
        copies = environment.get(count, "")
        if copies.isdigit() and int(copies) > 1 and this_copy(environment).world == 1:
            raise LinsightError(
                f"{count}={copies}: {copies} copies would train the same run, each for itself, as nothing says which "
                f"of them this one is: start them with torchrun, `accelerate launch` or srun, or unset {count}"
            )


def is_command() -> bool:
    """True in a process of the command `linsight`, also as `python -m linsight.cli`."""
    if not sys.argv:
        return False
    if sys.argv[0] == "-m":  # which module is run is known only later
        return "linsight.cli" in sys.orig_argv
    return pathlib.PurePath(sys.argv[0]).name in ("linsight", "linsight.exe")
