"""A result in parts, which are there or not: a stopped prediction goes on, and several processes share one.

Beside the result `x.csv` lies the folder `x.csv.parts` with `plan.json`, which says what the result is made of, and a
file for each part. When all parts are there they become the result, and the plan remains.
"""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from linsight.data.trees import count
from linsight.errors import LinsightError
from linsight.runtime.files import HeldError, hold, replacing, require_folder, sync, to_json, writing
from linsight.runtime.places import located

from ._tables import Row, require_table, shortest, write_table

_PLAN = "plan.json"
_MOST = 1024  # images of a part
_PARTS = 256  # or so, where that makes smaller parts


@dataclasses.dataclass(frozen=True)
class Plan:
    """A result before it is made.

    images: how many.  chunk: so many are a part.  classes: what to call those of the model.  top: how many to tell.
    extra: names of arrays.  facts: what the result depends on, by name.  times: those of the files, by place.
    size: of the result in bytes, once it was written.
    """

    images: int
    chunk: int
    classes: tuple[str, ...]
    top: int
    extra: tuple[str, ...]
    facts: dict[str, str]
    times: dict[str, str]
    size: int = -1

    def other(self, before: "Plan") -> str:
        """The first thing in which it differs from a plan made before, "" where the results are the same."""
        for name in dict.fromkeys([*self.facts, *before.facts]):
            new, old = self.facts.get(name, "none"), before.facts.get(name, "none")
            if new != old:
                return f"{name}: {new} now, {old} before"
        changed = [name for name, time in self.times.items() if before.times.get(name, time) != time]
        return f"{changed[0]}: its files were written anew since" if changed else ""

    def names(self, indices: Sequence[int]) -> list[str]:
        """The names of classes by their places."""
        return [self.classes[index] if index < len(self.classes) else str(index) for index in indices]


def chunk_size(images: int, batch_size: int) -> int:
    """How many images are a part: a multiple of the batch, about a thousand of many images, fewer of few."""
    wanted = min(max(-(-images // _PARTS), batch_size), _MOST)
    return -(-wanted // batch_size) * batch_size


class Parts:
    """The parts of a result in a folder.

    Raises:
        LinsightError: the plan of the folder cannot be read.
    """

    def __init__(self, folder: pathlib.Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.count = -(-plan.images // plan.chunk)
        self.key = f"{zlib.crc32(to_json([plan.images, plan.chunk, plan.facts]).encode()):08x}"

    @classmethod
    def of(cls, folder: pathlib.Path) -> "Parts | None":
        """The parts that a folder has, None where it has no plan."""
        path = folder / _PLAN
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            lists: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
            }
            plan = Plan(**lists)
            if not (isinstance(plan.facts, dict) and isinstance(plan.times, dict) and plan.images > 0 < plan.chunk):
                raise ValueError
            return cls(folder, plan)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise LinsightError(f"'{path}' cannot be read: remove '{folder}' to begin anew") from error

    def images(self, number: int) -> range:
        """The images of a part, by their places."""
        return range(number * self.plan.chunk, min((number + 1) * self.plan.chunk, self.plan.images))

    def there(self) -> set[int]:
        """The numbers of the parts that are there."""
        named = re.compile(rf"part-(\d+)-{self.key}\.jsonl")
        return {int(found[1]) for found in map(named.fullmatch, os.listdir(self.folder)) if found}

    def missing(self) -> list[int]:
        """The numbers of the parts that are not."""
        there = self.there()
        return [number for number in range(self.count) if number not in there]

    def write(self, number: int, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Write a part: for each image its name, and `error`, or places of `classes`, `probabilities` and arrays."""
        lines = [to_json({"file": name, **_coded(found)}) + "\n" for name, found in rows]
        path = self._path(number)
        with writing(path), replacing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
            sync(temporary)

    def read(self, number: int) -> Iterator[Row]:
        """The rows of a part.

        Raises:
            LinsightError: it is damaged, as after a power cut; it is removed then.
        """
        path = self._path(number)
        try:
            rows = [self._row(json.loads(line)) for line in path.read_bytes().splitlines()]
            if len(rows) != len(self.images(number)):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            path.unlink(missing_ok=True)
            raise LinsightError(f"'{path}' was damaged and is removed: the same command predicts it again") from error
        yield from rows

    def keep(self) -> None:
        """Write the plan."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _PLAN
        with writing(path), replacing(path) as temporary:
            temporary.write_text(to_json(dataclasses.asdict(self.plan), indent=2) + "\n", encoding="utf-8")
            sync(temporary)

    def hold(self, name: str) -> Callable[[], None]:
        """Keep other processes from the same work; see `runtime.files.hold`."""
        return hold(self.folder, f".{name}.lock")

    def clear(self) -> None:
        """Remove all but the plan."""
        for name in os.listdir(self.folder):
            if name != _PLAN:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"part-{number:06}-{self.key}.jsonl"

    def _row(self, found: dict[str, Any]) -> Row:
        if "error" in found:
            return Row(found["file"], error=found["error"])
        extra = {name: np.frombuffer(base64.b64decode(found[name]), "<f4") for name in self.plan.extra}
        return Row(found["file"], self.plan.names(found["classes"]), found["probabilities"], None, extra)


def begin(out: pathlib.Path, plan: Plan) -> Parts | None:
    """The parts of the result `out`, of which some may be there; None where it is finished.

    Raises:
        LinsightError: there is a file `out` that is not of this plan, or there are parts of another.
    """
    require_folder(out.parent)
    folder = out.with_name(f"{out.name}.parts")
    kept = Parts.of(folder)
    other = plan.other(kept.plan) if kept is not None else ""
    if out.exists():
        if kept is None or out.is_dir():
            raise LinsightError(f"'{out}' exists: give another --out, or move it away")
        if other:
            raise LinsightError(f"'{out}' exists, of another prediction ({other}): give another --out, or move it away")
        if out.stat().st_size != kept.plan.size:
            raise LinsightError(
                f"'{out}' exists, and is not what this command wrote: give another --out, or move it away"
            )
        kept.clear()  # what is left where a process was killed just then
        return None
    if kept is not None and not other:
        return kept
    if kept is not None and kept.there():
        raise LinsightError(
            f"'{folder}' has parts of another prediction ({other}): give another --out, or remove that folder to "
            "begin anew"
        )
    parts = Parts(folder, plan)
    parts.keep()
    return parts


def finish(parts: Parts, out: pathlib.Path) -> int | None:
    """Make the result of the parts if all are there, and tell how many images could not be read.

    None: some are not there, or another process made it, or is at that.

    Raises:
        LinsightError: there is a file `out` of somebody else.
    """
    try:
        release = parts.hold("result")
    except HeldError:
        return None
    try:
        if parts.missing():
            return None
        if out.exists():
            begin(out, parts.plan)
            return None
        temporary = parts.folder / f".result-{uuid.uuid4().hex[:8]}{out.suffix}"
        try:
            bad = _write(temporary, [parts] * parts.count, parts.plan, out)
            Parts(parts.folder, dataclasses.replace(parts.plan, size=temporary.stat().st_size)).keep()
            with writing(out):
                os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
        sync(out.parent)
        parts.clear()
        return bad
    finally:
        release()


def merge_predictions(out: str | pathlib.Path, folders: Sequence[str | pathlib.Path] = ()) -> tuple[int, int]:
    """Write the result `out` of parts that several machines made; how many images it has, and how many are unread.

    Args:
        out: a file that ends in .csv, .jsonl or .parquet, and is not there yet.
        folders: those of the parts, which stay as they are; by default `out.parts`.

    Raises:
        LinsightError: there is no such folder, they are of different predictions, or parts are missing.
    """
    out = located(out)
    require_table(out, ())
    paths = [located(folder) for folder in folders] or [out.with_name(f"{out.name}.parts")]
    found: list[Parts] = []
    for path in paths:
        parts = Parts.of(path)
        if parts is None:
            raise LinsightError(f"'{path}' is no folder of parts: it has no {_PLAN}")
        first = (found or [parts])[0]
        plain = [dataclasses.replace(entry.plan, times={}, size=-1) for entry in (parts, first)]
        if other := plain[0].other(plain[1]):
            raise LinsightError(f"'{path}' is of another prediction than '{first.folder}' ({other})")
        if parts.plan.chunk != first.plan.chunk:
            raise LinsightError(f"'{path}' and '{first.folder}' have parts of different --batch-size")
        found.append(parts)
    plan = found[0].plan
    require_table(out, plan.extra)
    require_folder(out.parent)
    if out.exists():
        raise LinsightError(f"'{out}' exists: give another name, or move it away")
    owners: dict[int, Parts] = {number: parts for parts in found for number in parts.there()}
    missing = [number for number in range(found[0].count) if number not in owners]
    if missing:
        images = found[0].images(missing[0])
        raise LinsightError(
            f"{len(missing)} of {count(found[0].count, 'part', 'parts')} missing, first images {images.start + 1} to "
            f"{images.stop}: wait for all shards, or give their folders too"
        )
    with replacing(out) as temporary:
        bad = _write(temporary, [owners[number] for number in range(found[0].count)], plan, out)
    return plan.images, bad


def _write(path: pathlib.Path, owners: Sequence[Parts], plan: Plan, out: pathlib.Path) -> int:
    """Write all rows to `path`, which will be `out`; how many images could not be read."""
    bad = 0

    def rows() -> Iterator[Row]:
        nonlocal bad
        for number, parts in enumerate(owners):
            for row in parts.read(number):
                bad += row.error is not None
                yield row

    with writing(out):
        write_table(path, rows(), plan.top, plan.extra)
        sync(path)
    return bad


def _coded(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers as they are written: few in decimal, arrays in base 64."""
    return {
        name: base64.b64encode(value.astype("<f4").tobytes()).decode()
        if isinstance(value, np.ndarray)
        else shortest(value)
        if name == "probabilities"
        else value
        for name, value in found.items()
    }
