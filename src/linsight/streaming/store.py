"""Where maps of activations lie between two steps: in memory, or in files that are mapped into it."""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linsight.errors import LinsightError
from linsight.ops import Tile
from linsight.runtime.files import hold, to_json, write_text
from linsight.runtime.memory import free_memory, in_words

STATE = "stream.json"
MAP = "map.npy"
LOCK = ".linsight-lock"


class Canvas:
    """A map `(h, w, C)`, read and written in rectangles."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def read(self, tile: Tile, like: Tensor) -> Tensor:
        """The tokens of `tile` with its halo, without prefix: `(1, n, C)`, on the device and in the dtype of `like`."""
        return self.rectangle(tile.rows, tile.columns, like).flatten(1, 2)

    def rectangle(self, rows: tuple[int, int], columns: tuple[int, int], like: Tensor) -> Tensor:
        """A rectangle of the map, `(1, h, w, C)`."""
        return self.data[slice(*rows), slice(*columns)].to(like)[None]

    def write(self, tile: Tile, x: Tensor) -> None:
        """The tile's own tokens `(1, n, C)`, without prefix."""
        rows, columns = slice(tile.top, tile.top + tile.height), slice(tile.left, tile.left + tile.width)
        self.data[rows, columns] = x[0].unflatten(0, (tile.height, tile.width)).to(self.data)


class Memory:
    """Maps in memory. Nothing is kept of a run that stops."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def check(self, need: int) -> None:
        """Raise a LinsightError unless so many bytes are free."""
        free = free_memory()
        if need > free.bytes:
            raise LinsightError(
                f"the maps of this image need {in_words(need)} of memory and {free} are free: give a scratch "
                f"folder on a disk, or bfloat16 as their dtype, which halves them"
            )

    def resume(self, work: dict[str, Any]) -> tuple[int, Canvas | None, Tensor | None]:
        """How many steps are done, and what they left: nothing."""
        return 0, None, None

    def new(self, step: int, shape: tuple[int, int, int]) -> Canvas:
        """A map for what `step` writes."""
        return self._empty(shape, self.dtype)

    def _empty(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Canvas:
        try:
            return Canvas(torch.empty(shape, dtype=dtype))
        except RuntimeError as error:
            raise LinsightError(f"no memory for a map of {shape}: give a scratch folder on a disk") from error

    def keep(self, steps: Collection[int]) -> None:
        """The maps of these steps are needed to the end."""

    def kept(self, step: int, shape: tuple[int, ...]) -> Canvas:
        """Such a map, of a step that is done: it is in nobody's memory."""
        raise AssertionError("nothing is done before a run in memory begins")

    def done(self, step: int, canvas: Canvas, prefix: Tensor | None, work: dict[str, Any]) -> None:
        """`step` has written all of its map, and the one before is not needed any more."""

    def stopped(self) -> None:
        """The run ends before its end."""

    def output(self, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, name: str = MAP) -> Canvas:
        """A place for the final map."""
        return self._empty(shape, dtype)

    def end(self, output: Canvas | None) -> Tensor | None:
        """The run is over; its final map, if it wrote one."""
        return None if output is None else output.data


class Scratch:
    """Maps in files of a folder, with a state after each step from which a stopped run goes on.

    Raises:
        LinsightError: no folder can be there, another run works in it, or it holds the state of one that `resume`
            does not ask for.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: torch.dtype, resume: bool) -> None:
        self.folder, self.dtype = pathlib.Path(folder), dtype
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LinsightError(f"scratch='{folder}' is no folder: {error.strerror}") from error
        self._lock = hold(self.folder, LOCK)
        held = (self.folder / STATE).exists()
        if held and not resume:
            self._lock()
            raise LinsightError(
                f"'{folder}' holds the state of a stopped run: resume=True (--resume) goes on with it; or give another"
            )
        self._going_on = held
        self._ours = False  # True once the content of the folder is of this run
        self._last: pathlib.Path | None = None  # the map that belongs to the state
        self._kept: frozenset[int] = frozenset()  # steps whose maps are needed to the end
        self._name = MAP

    def check(self, need: int) -> None:
        """Raise a LinsightError unless so many bytes are free, beside what a stopped run left there."""
        free = shutil.disk_usage(self.folder).free + sum(file.stat().st_size for file in self._maps())
        if need > free:
            raise LinsightError(
                f"the maps of this image need {in_words(need)} of disk and {in_words(free)} are free in "
                f"'{self.folder}': give a scratch folder on another disk, or bfloat16 as their dtype, which halves them"
            )

    def resume(self, work: dict[str, Any]) -> tuple[int, Canvas | None, Tensor | None]:
        """How many steps are done, and the map and prefix tokens that they left."""
        if not self._going_on:
            self._ours = True
            self._clear()
            return 0, None, None
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            step, shape, before = int(state["step"]), tuple(map(int, state["shape"])), dict(state["work"])
            prefix = None if state["prefix"] is None else torch.tensor(state["prefix"], dtype=torch.float32)[None]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LinsightError(f"'{self.folder / STATE}' cannot be read: delete the folder and start again") from error
        odd = [key for key in work if before.get(key) != work[key]]
        if odd:
            raise LinsightError(
                f"'{self.folder}' holds the state of another run (of another {' and '.join(odd)}): give another folder"
            )
        canvas, path = self.kept(step, shape), self._file(step)
        self._ours, self._last = True, path
        self._clear(path)
        return step + 1, canvas, prefix

    def keep(self, steps: Collection[int]) -> None:
        """The maps of these steps are needed to the end."""
        self._kept = frozenset(steps)

    def kept(self, step: int, shape: tuple[int, ...]) -> Canvas:
        """The map of a step that is done."""
        path = self._file(step)
        if not path.exists() or path.stat().st_size != _bytes(shape, self.dtype):
            raise LinsightError(f"'{path}' is missing or damaged: delete the folder and start again")
        return self._map(path, shape)

    def new(self, step: int, shape: tuple[int, int, int]) -> Canvas:
        """A map for what `step` writes, with its place on the disk taken: a full disk is found here, not later."""
        path = self._file(step)
        try:
            allocate(path, _bytes(shape, self.dtype))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise LinsightError(
                f"no place for {in_words(_bytes(shape, self.dtype))} in '{path}': {error.strerror}"
            ) from error
        return self._map(path, shape)

    def done(self, step: int, canvas: Canvas, prefix: Tensor | None, work: dict[str, Any]) -> None:
        """`step` has written all of its map, and the one before is not needed any more."""
        path = self._file(step)
        state = {
            "step": step,
            "shape": list(canvas.data.shape),
            "prefix": None if prefix is None else prefix[0].float().tolist(),
            "work": work,
        }
        try:
            _sync(path)  # the map is on the disk before the state that tells of it
            write_text(self.folder / STATE, to_json(state))
        except OSError as error:
            raise LinsightError(f"the state cannot be written to '{self.folder}': {error.strerror}") from error
        self._last = path
        self._clear(path)

    def stopped(self) -> None:
        """The run ends before its end: only the state and its map stay."""
        if self._ours:
            self._clear(self._last)
            (self.folder / f".{self._name}").unlink(missing_ok=True)
        self._lock()

    def output(self, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, name: str = MAP) -> Canvas:
        """A place for the final map, in a NumPy file that has its name once it is whole."""
        self._name = name
        path = self.folder / f".{name}"
        try:
            allocate(path, 128 + _bytes(shape, dtype))
            kind = torch.empty(0, dtype=dtype).numpy().dtype
            return Canvas(torch.from_numpy(np.lib.format.open_memmap(path, "w+", kind, shape)))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise LinsightError(f"no place for the final map in '{self.folder}': {error.strerror}") from error

    def end(self, output: Canvas | None) -> Tensor | None:
        """The run is over: only the final map stays."""
        if output is not None:
            path = self.folder / f".{self._name}"
            try:
                _sync(path)
                os.replace(path, self.folder / self._name)
            except OSError as error:
                raise LinsightError(f"the map cannot be written to '{self.folder}': {error.strerror}") from error
        (self.folder / STATE).unlink(missing_ok=True)
        self._kept = frozenset()
        self._clear()
        self._lock()
        return None if output is None else output.data

    def _file(self, step: int) -> pathlib.Path:
        return self.folder / f"linsight-{step}.map"

    def _maps(self) -> Iterable[pathlib.Path]:
        return self.folder.glob("linsight-*.map")

    def _clear(self, but: pathlib.Path | None = None) -> None:
        """Remove all maps but one, and those that are kept; without one, these too."""
        stay = {but, *(self._file(step) for step in self._kept)} if but else set()
        for file in self._maps():
            if file not in stay:
                file.unlink(missing_ok=True)

    def _map(self, path: pathlib.Path, shape: tuple[int, ...]) -> Canvas:
        size = shape[0] * shape[1] * shape[2]
        return Canvas(torch.from_file(str(path), shared=True, size=size, dtype=self.dtype).view(shape))


def allocate(path: pathlib.Path, size: int) -> None:
    """Make a file of `size` bytes that exist on the disk; a sparse one would end the process when the disk is full."""
    path.unlink(missing_ok=True)  # not the same file, which may still be mapped somewhere
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        zeros = bytes(2**24)
        for start in range(0, size, len(zeros)):
            file.write(zeros[: size - start])


def _sync(path: pathlib.Path) -> None:
    """Wait until what was written to the map in `path` is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    return int(np.prod(list(shape), dtype=np.int64)) * dtype.itemsize


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A digest of the values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
