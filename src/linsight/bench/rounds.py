"""Steps timed side by side, in rounds that alternate, with the memory that each takes."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROUNDS = 3  # at least, whatever the time
SAMPLE = 0.1  # seconds that a sample lasts at least: shorter steps are repeated


@dataclasses.dataclass
class Side:
    """The result of one of the things compared: facts, seconds of a step in each round, or why there are none."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    times: list[float] = dataclasses.field(default_factory=list)
    error: str = ""


Step = Callable[[], Any]
# Tells of side 0, 1 ...: "begin", "facts", "time" (seconds) or "error" (a line).
Send = Callable[[int, str, Any], None]
# Makes a side of what stands for it: facts, and the step to time.
Make = Callable[[Any], tuple[dict[str, Any], Step]]


def alternate(sides: Mapping[int, Any], make: Make, send: Send, device: torch.device, seconds: float) -> None:
    """Time the steps of all sides in rounds, the first one changing, for some seconds.

    The first round also tells the memory that a step takes, as the fact `peak_mb`, where `make` does not.
    """
    steps: dict[int, tuple[Step, int]] = {}
    told: set[int] = set()  # sides that know of their memory

    def attempt(side: int, act: Callable[[], None]) -> None:
        send(side, "begin", None)
        try:
            act()
        except Exception as error:  # any error: it is what there is to report
            steps.pop(side, None)
            send(side, "error", (str(error).strip() or type(error).__name__).splitlines()[0][:200])
        if side not in steps:
            release(device)

    def prepare(side: int) -> None:
        facts, step = make(sides[side])
        send(side, "facts", facts)
        if "peak_mb" in facts:
            told.add(side)
        took = timed(step, 1, device)
        if took < seconds / 10:  # the very first one also sets things up
            took = timed(step, 1, device)
        steps[side] = step, max(1, round(SAMPLE / max(took, 1e-9)))

    def sample(side: int) -> None:
        def measured() -> None:
            send(side, "time", timed(*steps[side], device))

        if side in told:
            measured()
        else:
            told.add(side)
            send(side, "facts", {"peak_mb": peak_of(measured, device)})

    for side in sides:
        attempt(side, functools.partial(prepare, side))
    end, rounds = time.perf_counter() + seconds, 0
    while steps and (rounds < ROUNDS or time.perf_counter() < end):
        for side in sorted(steps, reverse=bool(rounds % 2)):
            attempt(side, functools.partial(sample, side))
        rounds += 1


def timed(step: Step, repeats: int, device: torch.device) -> float:
    """Seconds of one step: by events on CUDA, else by the clock."""
    synchronise(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / repeats
    begun = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronise(device)
    return (time.perf_counter() - begun) / repeats


def synchronise(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def release(device: torch.device) -> None:
    """Give memory back, to the other sides or to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def peak_of(act: Callable[[], Any], device: torch.device) -> float | None:
    """The megabytes that something takes at most beyond what was there before: None where nobody counts them."""
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    counted = device.type == "cpu" and reset_peak()
    before = _resident("VmRSS") if counted else 0
    act()
    return (_resident("VmHWM") - before) / 2**10 if counted else None


def reset_peak() -> bool:
    """Let Linux count the peak of this process's memory from now on; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
