"""Memory that the process frees and asks for again, kept by the C library instead of given back to the system."""

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Iterator

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
_NEVER = 2**31 - 1
_USUAL = {_TRIM: 2**26, _MMAP: 2**25}  # the largest that glibc comes to by itself
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # who sets these is left alone
_entered = 0
_lock = threading.Lock()


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """While entered, glibc keeps what is freed; True where it does, False with other C libraries or a choice made.

    Each step of training on a CPU frees the same large blocks that the next one asks for. By default the system takes
    them back and clears every page of them again, step after step. At the end all that is free is given back, and
    both thresholds stay where glibc's own rule would bring them at most.
    """
    global _entered
    libc = None if any(name in os.environ for name in _CHOSEN) else _glibc()
    if libc is None:
        yield False
        return
    with _lock:
        _entered += 1
        if not libc.mallopt(_MMAP, _NEVER):  # before 2.35 there is a bound
            libc.mallopt(_MMAP, _USUAL[_MMAP])
        libc.mallopt(_TRIM, _NEVER)
    try:
        yield True
    finally:
        with _lock:
            _entered -= 1
            if not _entered:
                for option, value in _USUAL.items():
                    libc.mallopt(option, value)
                libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
