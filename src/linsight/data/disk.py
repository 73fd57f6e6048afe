"""Decoded images in files, for data that take more than memory: decoded once, then read as they are."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL

from linsight.errors import ImageError, LinsightError
from linsight.runtime.files import HeldError, hold, sync, to_json, writing

from .images import all_decoded
from .sources import Part, Source
from .trees import shown

_ABOUT, _PIXELS, _TABLE = "about.json", "pixels.bin", "table.npz"
_FORMAT = 1
_SURVEYED = 200  # images after which the size of all is foreseen
_ABANDONED = 3600  # seconds after which a half-written folder is nobody's
_WAYS = "cache=off goes without, cache_dir=FOLDER keeps them elsewhere"


class Kept(Source):
    """The decoded images of a source, in a folder that `on_disk` has written; bad ones keep their places.

    Raises:
        LinsightError: the folder is damaged.
    """

    def __init__(self, folder: pathlib.Path, source: Source) -> None:
        self.folder, self.targets, self.classes, self.notes = folder, source.targets, source.classes, source.notes
        self.shards = source.shards
        self._pixels: Any = None
        try:
            about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
            self.bad = {int(index): str(line) for index, line in about["bad"].items()}
            self.told = [(int(index), str(line)) for index, line in about["notes"]]
            with (folder / _TABLE).open("rb") as file, np.load(file, allow_pickle=False) as table:
                self.ends, self.shapes = table["ends"], table["shapes"]
            sizes = len(self.ends), (folder / _PIXELS).stat().st_size
            if sizes != (len(source), int(self.ends[-1])):
                raise ValueError("it is not as large as it was")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise LinsightError(f"the decoded images in {shown(folder)} are damaged ({error}): remove them") from error

    def __len__(self) -> int:
        return len(self.ends)

    def stored(self, index: int) -> Any:
        """See `Source`."""
        if index in self.bad:
            raise ImageError(self.bad[index])
        if self._pixels is None:
            self._pixels = np.memmap(self.folder / _PIXELS, np.uint8, "r")
        start = int(self.ends[index - 1]) if index else 0
        shape = [side for side in self.shapes[index].tolist() if side]
        return np.asarray(self._pixels)[start : int(self.ends[index])].reshape(shape)

    def name(self, index: int) -> str:
        """See `Source`."""
        return f"image {index} of {shown(self.folder)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # which would travel to other processes by its bytes


def on_disk(
    source: Source,
    in_chans: int,
    fill: float | None,
    folder: pathlib.Path,
    workers: int,
    note: Callable[[str], None],
) -> tuple[Source, list[str], list[str]]:
    """A source decoded into files below `folder`, where they are not there yet; as `cached` otherwise.

    They are those of the very files that the source has now, of a number of channels and a `fill`. The files are whole
    or absent: of several processes that want them, one writes and the others wait. A source without files is itself.

    Raises:
        LinsightError: they cannot be written, as on a full disk, which leaves nothing; or are damaged.
    """
    kept = _keep(source, in_chans, fill, folder, workers, note)
    whole, indices = (kept.whole, kept.indices) if isinstance(kept, Part) else (kept, range(len(kept)))
    if not isinstance(whole, Kept):
        return source, [], []
    own = set(indices)
    bad = [line for index, line in whole.bad.items() if index in own]
    return kept, bad, [line for index, line in whole.told if index in own]


def _keep(
    source: Source,
    in_chans: int,
    fill: float | None,
    folder: pathlib.Path,
    workers: int,
    note: Callable[[str], None],
) -> Source:
    """A source in files, of a part of one the whole of which it is a part."""
    if isinstance(source, Part):
        whole: Any = _keep(source.whole, in_chans, fill, folder, workers, note)
        indices: Sequence[int] = source.indices
        if isinstance(whole, Part):  # a part of a part
            whole, indices = whole.whole, [whole.indices[index] for index in indices]
        return Part(whole, indices, source.classes)
    stamp = source.stamp()
    if not stamp:
        return source
    # decoders of other versions may round otherwise
    facts = [_FORMAT, stamp, len(source), in_chans, fill, PIL.__version__]
    place = folder / hashlib.sha256(to_json(facts).encode()).hexdigest()[:32]
    with _turn(place, note) as free:
        if free:
            note(f"decoding {len(source):,} images into {shown(place)}")
            _write(place, source, in_chans, fill, workers)
    return Kept(place, source)


@contextlib.contextmanager
def _turn(place: pathlib.Path, note: Callable[[str], None]) -> Iterator[bool]:
    """True inside where `place` is to be written, by this process; False once it is there."""
    waiting = False
    while not place.exists():
        try:
            with writing(place.parent):
                place.parent.mkdir(parents=True, exist_ok=True)
            release = hold(place.parent, f".{place.name}.lock")
        except HeldError:
            if not waiting:
                note(f"another process decodes the images into {shown(place)}: waiting for it")
            waiting = True
            time.sleep(0.2)
            continue
        try:
            yield not place.exists()
        finally:
            release()
        return
    yield False


def _write(place: pathlib.Path, source: Source, in_chans: int, fill: float | None, workers: int) -> None:
    for other in place.parent.glob(f".{place.name}-*"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in (other, *other.iterdir())) > _ABANDONED:
                shutil.rmtree(other, ignore_errors=True)
    temporary = place.with_name(f".{place.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        _fill(temporary, source, in_chans, fill, workers)
        try:
            os.rename(temporary, place)
        except OSError:
            if not place.exists():  # where folders have no locks, another process may have been first
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise LinsightError(f"the decoded images cannot be written to {shown(place)}: {reason} ({_WAYS})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: pathlib.Path, source: Source, in_chans: int, fill: float | None, workers: int) -> None:
    ends, shapes = np.zeros(len(source), np.int64), np.zeros((len(source), 3), np.int32)
    bad: dict[int, str] = {}
    notes: list[tuple[int, str]] = []
    end = 0
    with (folder / _PIXELS).open("wb") as file:
        for index, (pixels, told_of) in enumerate(all_decoded(source, in_chans, fill, workers)):
            if isinstance(pixels, str):
                bad[index] = pixels
            else:
                file.write(np.ascontiguousarray(pixels).data)
                end += pixels.nbytes
                shapes[index, : pixels.ndim] = pixels.shape
            ends[index] = end
            notes += [(index, line) for line in told_of]
            if index == _SURVEYED:
                _check_room(folder, end // (index + 1) * (len(source) - index))
    np.savez(folder / _TABLE, ends=ends, shapes=shapes)
    (folder / _ABOUT).write_text(to_json({"bad": bad, "notes": notes}), encoding="utf-8")
    for name in (_PIXELS, _TABLE, _ABOUT):
        sync(folder / name)


def _check_room(folder: pathlib.Path, need: int) -> None:
    """Raise a LinsightError where the images to come take more than the disk has."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise LinsightError(
            f"the decoded images take about {need / 1e9:.1f} GB more, and {shown(folder.parent)} has "
            f"{free / 1e9:.1f} GB ({_WAYS})"
        )
