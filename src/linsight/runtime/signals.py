"""Signals: a run that is asked to stop ends between two steps, and leaves whole files."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, ClassVar, Self

from linsight.errors import LinsightError

# How one asks a process to end, and for how many seconds a repetition is still the same request: `timeout`, schedulers
# and terminals ask a process by itself and once more with its group.
REQUESTS = {
    getattr(signal, name): seconds
    for name, seconds in (("SIGINT", 1.0), ("SIGTERM", 30.0), ("SIGHUP", 30.0))
    if hasattr(signal, name)
}
_OUTLIVED = 5  # seconds that a worker goes on after such a request


class Interrupted(LinsightError):
    """A run was asked to stop and its state is saved; the message says how to go on."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Terminated(KeyboardInterrupt):
    """A request to end, whichever signal it came by.

    code: what the process is to exit with, 128 and the number of the signal.
    """

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def exit_code(stopped: BaseException) -> int:
    """The code to exit with after a KeyboardInterrupt, 128 and the number of its signal."""
    return stopped.code if isinstance(stopped, Terminated) else 128 + signal.SIGINT


class Unwinding:
    """While entered, SIGINT, SIGTERM and SIGHUP raise `Terminated`; repeated ones are heard once.

    Signals reach the main thread only; elsewhere it does nothing.
    """

    _entered: ClassVar[list["Unwinding"]] = []  # all of them share what was heard: when, and its code
    _heard: ClassVar[tuple[float, int] | None] = None

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            if not Unwinding._entered:
                Unwinding._heard = None
            Unwinding._entered.append(self)
            for number in REQUESTS:
                if signal.getsignal(number) != signal.SIG_IGN or number in (signal.SIGINT, signal.SIGTERM):
                    self._before[number] = signal.signal(number, self._catch)  # a SIGHUP that nohup ignores stays so
        if Unwinding._entered and Unwinding._heard is not None:  # before, or lost in what catches everything
            try:
                self._ask(Unwinding._heard[1])
            except Terminated:
                self.__exit__()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self in Unwinding._entered:
            Unwinding._entered.remove(self)
        self._before = {}

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            quieten()
        now = time.monotonic()
        if Unwinding._heard is None:
            Unwinding._heard = now, 128 + number
            self._ask(128 + number)
        elif now - Unwinding._heard[0] > REQUESTS[signal.Signals(number)]:
            raise Terminated(128 + number)

    def _ask(self, code: int) -> None:
        raise Terminated(code)


class Stop(Unwinding):
    """While entered, the first SIGINT, SIGTERM or SIGHUP only sets `code` (128 + its number).

    One that comes a second later, or thirty for SIGTERM and SIGHUP, raises `Terminated`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.code = 0

    def _ask(self, code: int) -> None:
        self.code = code


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Inside, requests to end are put off until its end: an import that is cut in two leaves half of a module."""
    with Stop() as stop:
        yield
    if stop.code:
        raise Terminated(stop.code)


@contextlib.contextmanager
def without_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C is put off until its end; a program that is started never hears it: it is for this process.

    Such a program, still importing when a terminal sends Ctrl-C to its whole group, would end in a traceback.
    """
    mask = getattr(signal, "pthread_sigmask", None)
    before = mask(signal.SIG_BLOCK, [signal.SIGINT]) if mask else None
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)


def outlive() -> None:
    """Let a worker process outlive a signal to its group for some seconds: the main process still wants its answer.

    It then ends without an error, at once if it is asked again, as by a main process that has waited for its end.
    """
    for number in REQUESTS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _go_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _end)


def _go_on(number: int, frame: FrameType | None) -> None:
    signal.signal(number, _end)
    if hasattr(signal, "alarm"):
        signal.alarm(_OUTLIVED)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(0)


def quieten() -> None:
    """Drop what is still to be said where nobody can hear it, the terminal being closed."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            drop_output(descriptor)


def drop_output(*descriptors: int) -> None:
    """Let what is still written to `descriptors` go nowhere; by default, to standard output and error."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in descriptors or (1, 2):
            os.dup2(nowhere, descriptor)
