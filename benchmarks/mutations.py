"""Single faults put into a copy of the package, one at a time: do its tests notice?

    python benchmarks/mutations.py --only train/ --only ops/states.py

`mutations.toml` holds the faults: signs, off by one, dropped terms, swapped sides, turned conditions. For each, the
tests that concern its file run on the copy, which they import in place of the package. What they let pass is listed at
the end. They must pass on the package as it is: that is tried first, for each file. Exits with 1 where less than
--least percent of the faults are noticed. Processes are forked: on Linux and macOS.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from _script import exit_status

from linsight.errors import LinsightError

ROOT = Path(__file__).parents[1]
PACKAGE = "linsight"
TABLE = Path(__file__).with_suffix(".toml")
LONGEST = 300  # seconds of the tests of a fault, however slow the machine
PRELOAD = ("torch", "timm", "torchvision", "hypothesis")


class Fault(NamedTuple):
    """A change of `file`, a path in the package: `old`, which is there once, becomes `new`.

    tests: what pytest is given.
    """

    file: str
    tests: tuple[str, ...]
    what: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """`text`, that of the file, with the fault.

        Raises:
            LinsightError: the old text is not there exactly once.
        """
        if (found := text.count(self.old)) != 1:
            raise LinsightError(f"{self.file}, {self.what}: the text {self.old!r} is there {found} times, not once")
        return text.replace(self.old, self.new)


class Verdict(NamedTuple):
    """What the tests of a fault say. noticed: a test failed, or none came to its end.  by: the test that failed."""

    noticed: bool
    by: str
    seconds: float


def faults(table: Path = TABLE) -> list[Fault]:
    """All faults, by file."""
    rows = tomllib.loads(table.read_text(encoding="utf-8"))
    return [
        Fault(file, tuple(shlex.split(entry["tests"])), **change)
        for file, entry in rows.items()
        for change in entry["changes"]
    ]


class Copy:
    """A copy of the package in a folder of its own, which tests import, in forks of one process.

    preload: modules that this process imports first, none that imports the package.
    """

    def __init__(self, folder: Path, root: Path = ROOT, preload: Sequence[str] = PRELOAD) -> None:
        self.root, self.folder = root, folder
        shutil.copytree(root / "src" / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        self._written = 0
        command = [sys.executable, str(Path(__file__).with_name("_forked_tests.py")), *preload]
        self._tests = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Copy":
        return self

    def __exit__(self, *_: object) -> None:
        self._tests.communicate()

    def verdict(self, fault: Fault) -> Verdict:
        """The verdict of its tests on the copy with this fault, which is taken out again."""
        path = self.folder / PACKAGE / fault.file
        before = path.read_text(encoding="utf-8")
        self._write(path, fault.applied(before))
        try:
            return self.tested(fault.tests)
        finally:
            self._write(path, before)

    def _write(self, path: Path, text: str) -> None:
        """Write a file at a time of its own: a compiled one is known to be old by the second alone."""
        path.write_text(text, encoding="utf-8")
        self._written += 1
        os.utime(path, (self._written, self._written))

    def tested(self, tests: tuple[str, ...]) -> Verdict:
        """The verdict of some tests on the copy as it is.

        Raises:
            LinsightError: there are none.
        """
        out, started = self.folder / "out.txt", time.perf_counter()
        asked = {"package": str(self.folder), "root": str(self.root), "tests": tests}
        assert self._tests.stdin is not None and self._tests.stdout is not None
        print(json.dumps(asked | {"out": str(out), "seconds": LONGEST}), file=self._tests.stdin, flush=True)
        status = int(self._tests.stdout.readline())
        seconds = time.perf_counter() - started
        if status in (4, 5):  # of a wrong call, and of no tests
            raise LinsightError(f"no tests are found by {shlex.join(tests)}")
        said = out.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in said if line.startswith(("FAILED", "ERROR"))]
        by = lines[0].split(" - ")[0].partition(" ")[2] if lines else f"an end with {status}"
        return Verdict(status != 0, by, seconds)


def verdicts(chosen: list[Fault], copy: Copy) -> Iterator[tuple[Fault, Verdict]]:
    """Each fault with its verdict.

    Raises:
        LinsightError: tests fail without a fault, or an old text is not there once; before any fault of their file.
    """
    passed = set[tuple[str, ...]]()
    for fault in chosen:
        if fault.tests not in passed:
            plain = copy.tested(fault.tests)
            if plain.noticed:
                raise LinsightError(f"tests of {fault.file} fail as it is: {plain.by}")
            passed.add(fault.tests)
        yield fault, copy.verdict(fault)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="files that begin so, or faults that say so")
    parser.add_argument("--least", type=float, default=95.0, help="percent that must be noticed (%(default)s)")
    parser.add_argument("--list", action="store_true", help="the faults, without a test")
    return parser.parse_args(given)


def run(args: argparse.Namespace) -> int:
    chosen = [
        fault
        for fault in faults()
        if not args.only or any(fault.file.startswith(part) or part in fault.what for part in args.only)
    ]
    if not chosen:
        raise LinsightError(f"no fault begins with or says {' or '.join(args.only)}")
    if args.list:
        print("\n".join(f"{fault.file}: {fault.what}" for fault in chosen))
        return 0
    survivors = list[Fault]()
    with tempfile.TemporaryDirectory() as folder, Copy(Path(folder)) as copy:
        for fault, verdict in verdicts(chosen, copy):
            said = f"noticed by {verdict.by}" if verdict.noticed else "SURVIVES"
            print(f"{verdict.seconds:5.0f} s  {fault.file}: {fault.what}: {said}", flush=True)
            survivors += [] if verdict.noticed else [fault]
    share = 100 * (1 - len(survivors) / len(chosen))
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} faults noticed, {share:.1f} %")
    for fault in survivors:
        print(f"  {fault.file}: {fault.what}: {fault.old!r} -> {fault.new!r}")
    return int(share < args.least)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    return exit_status(__file__, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
