"""Files that are whole or absent: written beside their place, then moved into it. And folders that one run holds."""

import contextlib
import json
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import Any

from linsight.errors import LinsightError

_HELD: set[pathlib.Path] = set()  # by this process, which a lock of the system does not keep from itself


_TEMPORARY = re.compile(r"\.(.+)-[0-9a-f]{8}")


class HeldError(LinsightError):
    """A folder in which another process works."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path in the same folder, which becomes `path` if the block ends well."""
    # the suffix stays last: writers of figures go by it
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # where it could not be made, it cannot be removed either
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: pathlib.Path, names: Collection[str]) -> None:
    """Remove what a killed `replacing` left in `folder` of the files `names`; who calls holds the folder."""
    for file in leftovers(folder, names):
        with contextlib.suppress(OSError):
            file.unlink()


def leftovers(folder: pathlib.Path, names: Collection[str]) -> list[pathlib.Path]:
    """The temporary files of `replacing` for the files `names` in `folder`."""
    known = {(path.stem, path.suffix) for path in map(pathlib.Path, names)}
    found: list[pathlib.Path] = []
    for file in folder.iterdir():
        match = _TEMPORARY.fullmatch(file.stem)
        if match and (match[1], file.suffix) in known and file.is_file() and not file.is_symlink():
            found.append(file)
    return found


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Inside, whatever keeps `path` from being written (a full disk, no permission) is a LinsightError of one line."""
    try:
        yield
    except OSError as error:
        raise _unwritten(path, error) from error
    except RuntimeError as error:  # torch's writer hides what stopped it
        if isinstance(error.__context__, OSError):
            raise _unwritten(path, error.__context__) from error
        raise


def user_cache(name: str) -> pathlib.Path:
    """The folder `name` of linsight in the user's cache, which may not be there yet: XDG_CACHE_HOME, or ~/.cache."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:  # there is no such user
        home = tempfile.gettempdir()
    return pathlib.Path(home) / "linsight" / name


def require_folder(folder: pathlib.Path) -> None:
    """Raise, before anything is computed for it, unless `folder` can be written to, or made."""
    if folder.exists() and not folder.is_dir():
        raise LinsightError(f"'{folder}' is a file: give a folder")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise LinsightError(f"nothing can be written to '{folder}': '{above}' is no folder with that permission")


def require_place(path: pathlib.Path) -> None:
    """Raise, before anything is computed for it, unless the file `path` can be written, or replaced."""
    if path.is_dir():
        raise LinsightError(f"'{path}' is a folder: give the name of a file")
    if path.exists() and not path.is_file():
        raise LinsightError(f"'{path}' is no file of a disk, and would be replaced by one: give another name")
    folder = path.absolute().parent
    if not folder.exists():
        raise LinsightError(f"'{path}' cannot be written: there is no folder '{path.parent}'")
    require_folder(folder)


def _unwritten(path: pathlib.Path, error: OSError) -> LinsightError:
    if isinstance(error, FileNotFoundError) and not os.path.isdir(path.parent):
        return LinsightError(f"'{path}' cannot be written: the folder '{path.parent}' is gone, or never was")
    return LinsightError(f"'{path}' cannot be written: {error.strerror or error}")


def sync(path: pathlib.Path) -> None:
    """Wait until a file, or the names in a folder, are where a power cut leaves them."""
    folder = path.is_dir()
    with contextlib.suppress(*([OSError] if folder else [])):  # which not every system can open or write out
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write `text` to `path` in one move."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value: Any, *, indent: int | None = None, ascii: bool = True, finite: bool = True) -> str:
    """`value` as JSON, which has no word for what is no number: a LinsightError where there is one.

    ascii: other letters are written by their codes.  finite: False writes what is no number as Python does.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ascii, allow_nan=not finite)
    except ValueError as error:
        raise LinsightError(f"a value that is no number cannot be written as JSON ({error})") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` in one move."""
    write_text(path, to_json(value, indent=2) + "\n")


def read_json(path: pathlib.Path, most: int = 2**24) -> dict[str, Any]:
    """The object in a file of JSON, which may be anybody's.

    most: bytes that it may have.

    Raises:
        LinsightError: no such file, no regular one, larger, no JSON, or no object.
    """
    try:
        if not path.is_file():  # nor a pipe or a device, which may never end
            raise LinsightError(f"'{path}' is no file")
        if path.stat().st_size > most:
            raise LinsightError(f"'{path}' is too large: {path.stat().st_size} bytes, and {most} may be")
        found = json.loads(path.read_bytes())  # UTF-8 or 16, with or without a mark at the start
    except OSError as error:
        raise LinsightError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, LinsightError):
            raise
        raise LinsightError(f"'{path}' is damaged, or no JSON: {str(error).splitlines()[0]:.100}") from error
    if not isinstance(found, dict):
        raise LinsightError(f"'{path}' holds no object of JSON, but a {type(found).__name__}")
    return found


def hold(folder: pathlib.Path, name: str) -> Callable[[], None]:
    """Keep other runs out of `folder`, where the system can, until what is returned is called or this process ends.

    name: of the file in it that is locked. Processes that this one forks do not hold it, and cannot let go of it.
    """
    try:
        path = folder.resolve() / name
    except (OSError, RuntimeError) as error:  # links in a circle
        raise LinsightError(f"nothing can be written to '{folder}': {error}") from error
    taken = HeldError(f"another run works in '{folder}': wait for its end, or give another folder")
    if path in _HELD:  # to open and close its file would let go of the lock
        raise taken
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise LinsightError(f"nothing can be written to '{folder}': {error.strerror}") from error
    if not _lock(descriptor):
        os.close(descriptor)
        raise taken
    _HELD.add(path)
    owner = os.getpid()

    def release() -> None:
        if path in _HELD and os.getpid() == owner:
            _HELD.discard(path)
            with contextlib.suppress(OSError):  # the folder may be gone, or not be written to any more
                path.unlink()
            os.close(descriptor)

    return release


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not on every system
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks
    return True
