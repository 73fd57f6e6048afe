"""Memory that the process frees and asks for again, kept by the C library instead of given back to the system."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
_NEVER = 2**31 - 1
_USUAL = {_TRIM: 2**26, _MMAP: 2**25}  # the largest that glibc comes to by itself
_OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # who sets these has chosen


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """While entered, glibc keeps what is freed; True where it does, False with other C libraries or a choice made.

    Each step of training on a CPU frees the same large blocks that the next one asks for. By default the system takes
    them back and clears every page of them again: 10 to 20 % of a step. At the end all that is free is given back.
    """
    libc = None if any(name.startswith(_OWN) for name in os.environ) else _glibc()
    if libc is None:
        yield False
        return
    for option in (_MMAP, _TRIM):
        libc.mallopt(option, _NEVER)
    try:
        yield True
    finally:
        for option, value in _USUAL.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
