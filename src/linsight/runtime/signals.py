"""Signals: a run that is asked to stop ends between two steps, and leaves whole files."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from linsight.errors import LinsightError


class Interrupted(LinsightError):
    """A run was asked to stop and its state is saved; the message says how to go on."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Stop:
    """While entered, the first SIGINT or SIGTERM only sets `code` (128 + its number); the next acts as usual."""

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM unwinds as SIGINT does, so that the process that measures ends, too."""
    before: Callable[..., Any] | int | None = None
    main = threading.current_thread() is threading.main_thread()
    if main:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
