"""How this process was started: alone, or as one of many by a launcher."""

import os
import pathlib
import sys
from collections.abc import Mapping

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
