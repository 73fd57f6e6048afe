"""What bounds memory: the system, control groups of either kind, limits of the process; the least of all."""

import math
import pathlib

import pytest

from linsight.runtime.memory import free_memory

MB = 2**20
STATUS = "VmSize:\t    1024 kB\nVmData:\t     512 kB\n"
SYSTEM = {"proc/meminfo": "MemTotal: 99999 kB\nMemAvailable: 10240 kB\n", "proc/self/status": STATUS}


def group(folder, limit, used, **stat):
    old = "cgroup/memory" in folder
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    rows = "".join(f"{'total_' if old else ''}{name} {value}\n" for name, value in stat.items())
    files = {f"{folder}/{name}": f"{value}\n" for name, value in zip(names, (limit, used), strict=True)}
    return {**files, f"{folder}/memory.stat": f"anon 3\n{rows}"}


V2, V1, MIXED = "sys/fs/cgroup", "sys/fs/cgroup/memory", "sys/fs/cgroup/unified"
CASES = {
    "nothing is said": ({}, math.inf, ""),
    "the system": (SYSTEM, 10 * MB, ""),
    "no limit": ({**SYSTEM, "proc/self/cgroup": "0::/a\n", **group(f"{V2}/a", "max", 5)}, 10 * MB, ""),
    "own group": ({**SYSTEM, "proc/self/cgroup": "0::/a/b\n", **group(f"{V2}/a/b", 8 * MB, 5 * MB)}, 3 * MB, "group"),
    "a group above": (
        {**SYSTEM, "proc/self/cgroup": "0::/a/b\n", **group(f"{V2}/a/b", "max", 5), **group(f"{V2}/a", MB, 5)},
        MB - 5,
        "group",
    ),
    "caches are given back": (
        {"proc/self/cgroup": "0::/\n", **group(V2, 8 * MB, 8 * MB, inactive_file=MB, active_file=2, file=7)},
        MB + 2,
        "group",
    ),
    "first version": (
        {"proc/self/cgroup": "5:cpu:/x\n4:memory:/a\n0::/\n", **group(f"{V1}/a", 6 * MB, MB, inactive_file=9)},
        5 * MB + 9,
        "group",
    ),
    "a path of the host": ({"proc/self/cgroup": "4:cpu,memory:/docker/1\n", **group(V1, 6 * MB, MB)}, 5 * MB, "group"),
    "both kinds": ({"proc/self/cgroup": "0::/u\n4:memory:/\n", **group(f"{MIXED}/u", 9, 2)}, 7, "group"),
    "more is used than allowed": ({"proc/self/cgroup": "0::/\n", **group(V2, MB, 2 * MB)}, 0, "group"),
}


@pytest.fixture
def limits(monkeypatch):
    """Limits of the process, by name; none at first."""
    resource = pytest.importorskip("resource")
    set_to = {}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (set_to.get(what, resource.RLIM_INFINITY),) * 2)
    return lambda **given: set_to.update({getattr(resource, name): value for name, value in given.items()})


def written(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("case", CASES)
def test_system_and_control_groups(case, tmp_path, limits):
    files, expected, by = CASES[case]
    found = free_memory(written(tmp_path, files))
    assert found.bytes == expected and by in found.limit and bool(by) == bool(found.limit)


@pytest.mark.parametrize(("name", "used"), [("RLIMIT_AS", MB), ("RLIMIT_DATA", MB // 2)])
def test_limits_of_the_process(name, used, tmp_path, limits):
    limits(**{name: 4 * MB})
    found = free_memory(written(tmp_path, SYSTEM))
    assert found == (4 * MB - used, name) and str(found).endswith(f"MB (by {name})")
    limits(**{name: 40 * MB})
    assert free_memory(tmp_path) == (10 * MB, "")


def test_this_system_says_something():
    if not pathlib.Path("/proc/meminfo").exists():
        pytest.skip("no /proc here")
    assert MB < free_memory().bytes < math.inf
