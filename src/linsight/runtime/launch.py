"""How this process was started: alone, or as one of many by a launcher."""

import os
import pathlib
import sys
from collections.abc import Mapping
from typing import NamedTuple

from linsight.errors import LinsightError

# The variables that launchers set to the number of copies: torchrun and accelerate, SLURM's srun, MPI's.
_COPIES = (
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
)

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


def refuse_copies(environment: Mapping[str, str] = os.environ) -> None:
    """Raise where this process is one of several copies, which would all do the same work.

    Raises:
        LinsightError: a variable of the environment says so.
    """
    # a step of a SLURM job may have fewer tasks than the job
    names = [name for name in _COPIES if name in environment]
    if "SLURM_STEP_NUM_TASKS" in names and "SLURM_NTASKS" in names:
        names.remove("SLURM_NTASKS")
    for name in names:
        if environment[name].isdigit() and int(environment[name]) > 1:
            raise LinsightError(
                f"{name}={environment[name]}: {environment[name]} copies would train the same run, each for itself; "
                f"linsight trains in one process: start one, without torchrun, accelerate or srun, or with one task"
            )


def is_command() -> bool:
    """True in a process of the command `linsight`, also as `python -m linsight.cli`."""
    if not sys.argv:
        return False
    if sys.argv[0] == "-m":  # which module is run is known only later
        return "linsight.cli" in sys.orig_argv
    return pathlib.PurePath(sys.argv[0]).name in ("linsight", "linsight.exe")
