"""Images of one place, by their numbers: of files, of an archive, of a table."""

import array
import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, overload

import numpy as np

from ._archives import Archive


class Names(Sequence[str]):
    """Many names in little memory, which processes share."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.text, self.ends = bytearray(), array.array("q", [0])
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Add a name."""
        self.text += name.encode("utf-8", "surrogatepass")
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.text[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogatepass")


class Section(Protocol):
    """Images of one place.

    place: what a user called it.
    """

    place: str

    def __len__(self) -> int: ...

    def open(self, index: int) -> Any:
        """An image as it is kept, a path or an open file; raises OSError or ValueError where there is none."""
        ...

    def label(self, index: int) -> str:
        """The name of an image in the result."""
        ...

    def marks(self) -> tuple[str, str]:
        """Digests of the names and sizes of the files, and of their times."""
        ...


class Files:
    """Image files, below a folder or, with "", by their paths."""

    def __init__(self, place: str, folder: str, names: Iterable[str]) -> None:
        self.place, self.folder, self.names = place, folder, Names(names)

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> str:
        """See `Section`."""
        return self.label(index)

    def label(self, index: int) -> str:
        """See `Section`."""
        return os.path.join(self.folder, self.names[index])

    def marks(self) -> tuple[str, str]:
        """See `Section`."""
        return digests(map(self.label, range(len(self))), self.names.text, self.names.ends)


class Members:
    """Images in an archive."""

    def __init__(self, packed: Archive, names: Sequence[str]) -> None:
        self.place, self.names = packed.path, Names(names)
        members = [packed.members[name] for name in names]
        self.packed = None if isinstance(next(iter(members), None), tuple) else packed
        self.lies = np.array([] if self.packed else members, np.int64)  # in a tar: from which byte on, and how many

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> Any:
        """See `Section`."""
        if self.packed is not None:
            return self.packed.open(self.names[index])
        start, size = self.lies[index].tolist()
        return Archive.cut(self.place, start, size)

    def label(self, index: int) -> str:
        """See `Section`."""
        return f"{self.place}!{self.names[index]}"

    def marks(self) -> tuple[str, str]:
        """See `Section`."""
        return digests([self.place], self.names.text, self.names.ends)


class Rows:
    """Images of a table, by row. `reader` opens one; `file` is "" where it is not of one file."""

    def __init__(self, place: str, reader: Any, length: int, file: str = "") -> None:
        self.place, self.reader, self.length, self.file = place, reader, length, file

    def __len__(self) -> int:
        return self.length

    def open(self, index: int) -> Any:
        """See `Section`."""
        return self.reader.open(index)

    def label(self, index: int) -> str:
        """See `Section`."""
        return f"{self.place}!{index}"

    def marks(self) -> tuple[str, str]:
        """See `Section`."""
        return digests([self.file] if self.file else [], str(len(self)).encode())


def digests(files: Iterable[str], *content: Any) -> tuple[str, str]:
    """Digests of `content` with the sizes of files, and of their times; files that are gone have none."""
    sizes, times = array.array("q"), array.array("q")
    for file in files:
        try:
            about = os.stat(file)
        except (OSError, ValueError):
            sizes.append(-1)
            continue
        sizes.append(about.st_size)
        times.append(about.st_mtime_ns)
    what = hashlib.sha256()
    for part in (*content, sizes):
        what.update(part)
    return what.hexdigest()[:12], hashlib.sha256(times).hexdigest()[:12]
