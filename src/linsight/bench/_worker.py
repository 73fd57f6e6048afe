"""A process that measures, and that may be killed: for time, or by a system short of memory."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

from linsight.errors import LinsightError
from linsight.runtime.signals import without_interrupt

from .rounds import Side

TOO_LONG = "took more than"  # how the error of a side begins that was given up for its time


class Worker:
    """A process that measures cells, one after the other: `measure(cell, sides, send)` for `{index: what}` sides.

    `measure`, cells and what stands for a side are pickled. As a context manager, it ends the process at the end.

    limit: seconds that building a side and its first step, or a later sample, may take.
    """

    def __init__(self, measure: Callable[..., None], limit: float) -> None:
        self.measure, self.limit = measure, limit
        self.process: Any = None

    def run(self, cell: Any, sides: Sequence[Any]) -> list[Side]:
        """The sides of a cell. One that cost the process its life is left out, and the others are measured again."""
        found = [Side() for _ in sides]
        left = dict(enumerate(sides))
        while left:
            guilty = self._try(cell, left, found)
            if guilty is None:
                break
            del left[guilty]
            if all(found[side].times for side in left):
                break
        return found

    def _try(self, cell: Any, sides: dict[int, Any], found: list[Side]) -> int | None:
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
                yield -1, "lost", f"{TOO_LONG} {self.limit:g} s"
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
            self.process = context.Process(target=serve, args=(far, self.measure), daemon=True)
            resource_tracker.ensure_running()  # whose start would let Ctrl-C through
            with without_interrupt():
                self.process.start()
            far.close()
            try:
                self.pipe.recv()  # it is ready: what it takes to start is not a cell's time
            except EOFError:
                self.close()
                raise LinsightError(
                    "the process that measures did not start: a script needs its calls below if __name__ == '__main__'"
                ) from None

    def close(self, grace: float = 0.0) -> None:
        """End the process; after some seconds of grace in which it may clear up, if it waits for work."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(grace)
            self.process.kill()
            self.process.join()
            self.process = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.close(grace=0.0 if error else 5.0)


def serve(pipe: Any, measure: Callable[..., None]) -> None:
    """Answer the cells that come through `pipe`, each by messages and a None, until it is closed."""
    pipe.send("ready")
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            cell, sides = pipe.recv()
            measure(cell, sides, lambda *message: pipe.send(message))
            pipe.send(None)
