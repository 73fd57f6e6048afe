"""Steps timed side by side, in rounds, in a process that may be killed: for time, or by a system short of memory."""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from linsight.train._device import autocast

ROUNDS = 3  # at least, whatever the time
SAMPLE = 0.1  # seconds that a sample lasts at least: shorter steps are repeated


@dataclasses.dataclass
class Side:
    """What became of one of the things compared: facts, seconds of a step in each round, or why there are none."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    times: list[float] = dataclasses.field(default_factory=list)
    error: str = ""


# Tells of side 0, 1 ...: "begin", "facts", "time" (seconds) or "error" (a line).
Send = Callable[[int, str, Any], None]
# Makes a side by its name: facts, and the step to time.
Make = Callable[[str], tuple[dict[str, Any], Callable[[], None]]]


def step_of(
    model: nn.Module, size: int, batch: int, classes: int, device: torch.device, dtype: torch.dtype | None, train: bool
) -> Callable[[], None]:
    """A forward of `model`, or a training step of it with AdamW, on `batch` random images of `size`."""
    model.train(train)
    images = torch.randn(batch, 3, size, size, device=device)
    if not train:

        def infer() -> None:
            with torch.inference_mode(), autocast(device, dtype):
                model(images)

        return infer
    labels = torch.randint(classes, (batch,), device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def update() -> None:
        with autocast(device, dtype):
            logits = model(images)
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimiser)
        scaler.update()

    return update


def alternate(sides: dict[int, str], make: Make, send: Send, device: torch.device, seconds: float) -> None:
    """Time the steps of all sides in rounds, the first one changing, for some seconds."""
    steps: dict[int, tuple[Callable[[], None], int]] = {}

    def attempt(side: int, act: Callable[[], None]) -> None:
        send(side, "begin", None)
        try:
            act()
        except Exception as error:  # of whatever kind: it is what there is to report
            steps.pop(side, None)
            send(side, "error", (str(error).strip() or type(error).__name__).splitlines()[0][:200])
        if side not in steps:
            _release(device)

    def prepare(side: int) -> None:
        facts, step = make(sides[side])
        send(side, "facts", facts)
        took = _timed(step, 1, device)
        if took < seconds / 10:  # the very first one also sets things up
            took = _timed(step, 1, device)
        steps[side] = step, max(1, round(SAMPLE / max(took, 1e-9)))

    def sample(side: int) -> None:
        if rounds:
            send(side, "time", _timed(*steps[side], device))
        else:
            send(side, "facts", {"peak_mb": _peak(lambda: send(side, "time", _timed(*steps[side], device)), device)})

    for side in sides:
        attempt(side, functools.partial(prepare, side))
    end, rounds = time.perf_counter() + seconds, 0
    while steps and (rounds < ROUNDS or time.perf_counter() < end):
        for side in sorted(steps, reverse=bool(rounds % 2)):
            attempt(side, functools.partial(sample, side))
        rounds += 1


def _timed(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds of one step."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _release(device: torch.device) -> None:
    """Give memory back, to the other side or to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _peak(act: Callable[[], None], device: torch.device) -> float | None:
    """The megabytes that something takes at most beyond what was there before: None where nobody counts them."""
    _release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    counted = device.type == "cpu" and _reset_peak()
    before = _resident("VmRSS") if counted else 0
    act()
    return (_resident("VmHWM") - before) / 2**10 if counted else None


def _reset_peak() -> bool:
    """Let Linux count the peak of this process's memory from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Worker:
    """A process that measures cells, one after the other: `measure(cell, sides, send)` for `{index: name}` sides.

    limit: seconds that building a side and its first step, or a later sample, may take.
    """

    def __init__(self, measure: Callable[..., None], limit: float) -> None:
        self.measure, self.limit = measure, limit
        self.process: Any = None

    def run(self, cell: Any, names: Sequence[str]) -> list[Side]:
        """The sides of a cell. One that cost the process its life is left out, and the others are measured again."""
        found = [Side() for _ in names]
        left = dict(enumerate(names))
        while left:
            guilty = self._try(cell, left, found)
            if guilty is None:
                break
            del left[guilty]
            if all(found[side].times for side in left):
                break
        return found

    def _try(self, cell: Any, sides: dict[int, str], found: list[Side]) -> int | None:
        """Fill in `found`; the side that ended the process, if one did."""
        self._start()
        self.pipe.send((cell, sides))
        now = next(iter(sides))
        for side, kind, value in self._messages():
            if kind == "begin":
                now = side
            elif kind == "time":
                found[side].times.append(value)
            elif kind == "facts":
                found[side].facts.update(value)
            elif kind == "error":
                found[side].error = value
            elif kind == "lost":
                self.close()
                found[now].error = value
                return now
        return None

    def _messages(self) -> Iterator[tuple[int, str, Any]]:
        while True:
            if not self.pipe.poll(self.limit):
                yield -1, "lost", f"took more than {self.limit:g} s"
                return
            try:
                message = self.pipe.recv()
            except EOFError:
                yield -1, "lost", "killed, most likely for want of memory"
                return
            if message is None:
                return
            yield message

    def _start(self) -> None:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, far = context.Pipe()
            self.process = context.Process(target=_serve, args=(far, self.measure), daemon=True)
            self.process.start()
            far.close()
            self.pipe.recv()  # it is ready: what it takes to start is not a cell's time

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _serve(pipe: Any, measure: Callable[..., None]) -> None:
    pipe.send("ready")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            cell, sides = pipe.recv()
            measure(cell, sides, lambda *message: pipe.send(message))
            pipe.send(None)
