"""Processes that make one run together, as torchrun, `accelerate launch` or srun started them; most runs have one."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from linsight.errors import LinsightError, MissingExtraError

from .device import pick_device
from .launch import Copy, require_rank, this_copy

T = TypeVar("T")


class Processes:
    """The processes of a run, one of which, the main one, writes its files; here, one alone.

    All processes make the same calls, in the same order.

    copy: which this one is, of how many.
    """

    copy = Copy()

    @property
    def main(self) -> bool:
        """True in the process that writes and tells."""
        return self.copy.rank == 0

    def device(self, name: str) -> torch.device:
        """The device called `name`, for this process; see `pick_device`."""
        return pick_device(name)

    def tell(self, *numbers: int) -> list[list[int]]:
        """Small whole numbers of every process, by rank; no device waits for it."""
        return [list(numbers)]

    def gather(self, value: T) -> list[T]:
        """A value of every process, by rank."""
        return [value]

    def share(self, value: T) -> T:
        """The value that the main process gives, on every process."""
        return value

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """A context that the main process goes through before the others, which find what it left, as downloads."""
        yield

    def lost(self, error: BaseException) -> LinsightError | None:
        """Our error for one that torch raises where another process is gone; None of any other."""
        return None

    def close(self) -> None:
        """End the company: no process waits for another from now on."""


class Launched(Processes):
    """Several processes of a launcher, joined.

    Args:
        copy: which this one is.
        device: what the run computes on: 'cpu', or the kind of device of which each process takes its own.
    """

    def __init__(self, copy: Copy, device: str) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtraError("accelerate", "train", f"a run of {copy.world} processes") from error
        self.copy = copy
        if device not in ("auto", "cpu", "cuda", "mps", "xpu"):
            raise LinsightError(f"device={device}: {copy.world} processes take a device each, leave its number out")
        _as_torchrun(copy)
        self._begun = not dist.is_initialized()  # else the group is of who called us, and goes on
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # ours are a field of the recipe
                self._state = PartialState(cpu=device == "cpu")
            # what is told on the CPU keeps no GPU waiting
            self._group: Any = dist.new_group(backend="gloo")
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise LinsightError(f"process {copy.rank + 1} of {copy.world} cannot reach the others: {why}") from error

    def device(self, name: str) -> torch.device:
        """See `Processes`."""
        found = self._state.device
        return torch.device("cpu") if found.type == "cpu" else found

    def tell(self, *numbers: int) -> list[list[int]]:
        """See `Processes`."""
        own = torch.tensor(numbers, dtype=torch.long)
        found = [torch.empty_like(own) for _ in range(self.copy.world)]
        with self.speaking():
            dist.all_gather(found, own, group=self._group)
        return [values.tolist() for values in found]

    def gather(self, value: T) -> list[T]:
        """See `Processes`."""
        found: list[Any] = [None] * self.copy.world
        with self.speaking():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def share(self, value: T) -> T:
        """See `Processes`."""
        found: list[Any] = [value if self.main else None]
        with self.speaking():
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """See `Processes`."""
        if not self.main:
            self.tell(0)
        yield
        if self.main:
            self.tell(0)

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """A context for what needs the others: where one of them is gone, the error is one line."""
        try:
            yield
        except RuntimeError as error:
            lost = self.lost(error)
            if lost is None:
                raise
            raise lost from error

    def lost(self, error: BaseException) -> LinsightError | None:
        """See `Processes`."""
        if not _is_lost(error):
            return None
        return LinsightError(
            f"process {self.copy.rank + 1} of {self.copy.world} has lost the others: one was killed, or ended with an "
            "error of its own"
        )

    def close(self) -> None:
        """See `Processes`."""
        if self._begun and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        self._state._reset_state()


def join(device: str) -> Processes:
    """The processes that this one was started with, which meet here; alone where there is no launcher.

    device: of the recipe.

    Raises:
        LinsightError: the others cannot be reached, or devices cannot be shared out so.
    """
    require_rank()
    copy = this_copy()
    return Processes() if copy.world == 1 else Launched(copy, device)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """A context of `join`, at whose end the processes part."""
    processes = join(device)
    try:
        yield processes
    finally:
        processes.close()


def _is_lost(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("Connection", "connection", "gloo", "Gloo", "NCCL", "ProcessGroup", "Broken pipe")
    )


def _as_torchrun(copy: Copy) -> None:
    """Set the variables that torch reads, where another launcher calls them otherwise.

    Raises:
        LinsightError: nothing says where the first process is.
    """
    if "MASTER_ADDR" not in os.environ and copy.local_world < copy.world:
        raise LinsightError(
            f"{copy.world} processes, and nothing says where the first one is: set MASTER_ADDR to its host (and "
            "MASTER_PORT), or start with torchrun"
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name, value in zip(names, copy, strict=True):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29500")
