"""Feeds of other processes, watched over: where one of these is killed, the end is one line."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from linsight.errors import LinsightError
from linsight.runtime.signals import Unwinding

T = TypeVar("T")
KILLED = (
    "a process that reads images was killed, most likely for want of memory, shared memory or open files: set workers "
    "lower"
)
_LOST = ("DataLoader worker", "Pin memory thread exited", "unable to open shared memory", "received 0 items of ancdata")
_PATIENCE = 0.2  # seconds in which a signal to all processes of a run reaches this one, too


def watched(feed: Iterable[T], line: str = KILLED, stopped: Callable[[], None] = lambda: None) -> Iterator[T]:
    """The items of `feed`, which other processes may make.

    stopped: called where one of these is lost; it may raise where this process was asked to stop, too.

    Raises:
        LinsightError: one of them was killed, or the connection to it broke; with `line`.
        Terminated: that was so because this process was asked to end, too.
    """
    items = iter(feed)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if getattr(feed, "num_workers", getattr(feed, "workers", 1)) == 0 or not _is_lost(error):
                raise
            time.sleep(_PATIENCE)
            stopped()
            with Unwinding():  # raises where a signal came meanwhile, or was lost in what catches everything
                pass
            raise LinsightError(line) from error
        yield item


def _is_lost(error: Exception) -> bool:
    """True for what this process says of a worker that is no more; one that is there says "Caught ..."."""
    text = str(error)
    if text.startswith("Caught "):
        return False
    return isinstance(error, ConnectionError | EOFError) or (isinstance(error, RuntimeError) and text.startswith(_LOST))
