"""How much memory this process may still have: what the system says, its control groups and its own limits."""

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

_ROOT = pathlib.Path("/")


class Free(NamedTuple):
    """Bytes, infinite where nothing says how many, and what sets this limit."""

    bytes: float
    limit: str

    def __str__(self) -> str:
        return in_words(self.bytes) + (f" (by {self.limit})" if self.limit else "")


def in_words(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def free_memory(root: pathlib.Path = _ROOT) -> Free:
    """The least of all that bounds this process. `root` is where /proc and /sys are."""
    found = [Free(max(0, left), name) for name, source in SOURCES.items() for left in source(root)]
    return min(found, default=Free(math.inf, ""))


def _system(root: pathlib.Path) -> Iterator[int]:
    """Bytes that can be had without swapping."""
    available = _table(root / "proc/meminfo").get("MemAvailable:")
    if available is not None:
        yield available * 1024


class _Group(NamedTuple):
    """Where one kind of control groups is mounted, and what its files are called."""

    mount: str
    controller: str  # in /proc/self/cgroup
    limit: str
    used: str
    cached: tuple[str, ...]  # rows of memory.stat: counted as used, and given back when needed


_CACHED = ("active_file", "inactive_file")
_GROUPS = (
    _Group("sys/fs/cgroup", "", "memory.max", "memory.current", _CACHED),
    _Group("sys/fs/cgroup/unified", "", "memory.max", "memory.current", _CACHED),
    _Group(
        "sys/fs/cgroup/memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        tuple(f"total_{name}" for name in _CACHED),
    ),
)


def _control_groups(root: pathlib.Path) -> Iterator[int]:
    """Bytes that are left in the process's own groups and in all above them."""
    lines = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    for kind in _GROUPS:
        mount = root / kind.mount
        for path in (line[2] for line in lines if len(line) == 3 and kind.controller in line[1].split(",")):
            own = mount / path.lstrip("/")
            # In a container the path may be the host's, of which only the mount itself is there.
            for folder in (own, *own.parents) if own != mount else (mount,):
                limit, used = _read(folder / kind.limit).strip(), _read(folder / kind.used).strip()
                if limit.isdigit() and used.isdigit():
                    stat = _table(folder / "memory.stat")
                    yield int(limit) - int(used) + sum(stat.get(name, 0) for name in kind.cached)
                if folder == mount:
                    break


def _own_limit(name: str, row: str) -> Callable[[pathlib.Path], Iterator[int]]:
    """Bytes that are left below a limit of the process itself, of which `row` of /proc/self/status is used."""

    def left(root: pathlib.Path) -> Iterator[int]:
        try:
            import resource  # not on every system
        except ImportError:
            return
        limit = resource.getrlimit(getattr(resource, name))[0]
        used = _table(root / "proc/self/status").get(row)
        if limit != resource.RLIM_INFINITY and used is not None:
            yield limit - used * 1024

    return left


SOURCES: dict[str, Callable[[pathlib.Path], Iterator[int]]] = {
    "": _system,
    "the limit of a control group": _control_groups,
    "RLIMIT_AS": _own_limit("RLIMIT_AS", "VmSize:"),
    "RLIMIT_DATA": _own_limit("RLIMIT_DATA", "VmData:"),
}


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _table(path: pathlib.Path) -> dict[str, int]:
    """Rows of a name and a number."""
    rows = (line.split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
