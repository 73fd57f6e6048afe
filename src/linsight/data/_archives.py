"""Images in tar and zip files, which are read where they lie."""

import io
import os
import pathlib
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from linsight.errors import LinsightError

from .trees import Tree, count, shown, some, sort_tree

# The endings of archives, and how compressed files begin: these cannot be read from their middle.
SUFFIXES = (".tar", ".zip", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
    RuntimeError,
)
_HEADER = 512  # bytes of a header in a tar; so many zeros are its end


class Archive:
    """The files of a tar or a zip, by their names. It may be copied to other processes.

    torn: what is wrong with the end of a tar, "" where nothing is.

    Args:
        path: of the archive.
        partly: take a tar whose end is damaged for what can be read of it.

    Raises:
        LinsightError: no such archive, a compressed or encrypted one, a damaged one, names that lead out of it.
    """

    def __init__(self, path: str | pathlib.Path, *, partly: bool = False) -> None:
        self.path, self.partly, self.torn = str(path), partly, ""
        self.members: dict[str, Any] = {}  # of a tar: where its bytes lie; of a zip: what it knows of it
        self.folders: set[str] = set()
        self.lost: list[str] = []  # links that lead to nothing in the archive
        self._open: tuple[int, zipfile.ZipFile] | None = None
        kind = "zip" if self.path.lower().endswith(".zip") else "tar"
        try:
            with open(path, "rb") as file:
                start = file.read(_HEADER)
            if packing := next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None):
                raise LinsightError(
                    f"{shown(path)} is compressed ({packing}), and images are read in any order: unpack it"
                )
            if kind == "zip":
                self._read_zip()
            else:
                self._read_tar()
        except LinsightError:
            raise
        except _DAMAGE as error:
            raise LinsightError(f"{shown(path)} is no readable {kind} file: {_line(error)}") from error

    def tree(self) -> Tree:
        """The names of its files and folders."""
        tree = sort_tree(self.path, self.members, self.folders)
        if self.lost:
            links = count(len(self.lost), "link", "links")
            tree.notes.append(f"{links} to no file of the archive left out: {some(self.lost)}")
        return tree

    def open(self, name: str) -> BinaryIO:
        """A file of the archive; raises OSError where it is damaged."""
        member = self.members[name]
        try:
            if isinstance(member, zipfile.ZipInfo):
                return io.BytesIO(self._zip().read(member))
            return self.cut(self.path, *member)
        except _DAMAGE as error:
            raise OSError(f"damaged in the archive: {error}") from error

    @staticmethod
    def cut(path: str, start: int, size: int) -> BinaryIO:
        """A piece of a file, as a file."""
        with open(path, "rb") as file:
            file.seek(start)
            return io.BytesIO(file.read(size))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def _zip(self) -> zipfile.ZipFile:
        """The open file of this process: a place in a file is shared with the processes that inherit it."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.path))
        return self._open[1]

    def _read_zip(self) -> None:
        with zipfile.ZipFile(self.path) as file:
            for member in file.infolist():
                name = self._name(member.filename.replace("\\", "/"))
                if member.is_dir():
                    self.folders.add(name)
                elif stat.S_ISLNK(member.external_attr >> 16):
                    self.lost.append(name)
                elif member.flag_bits & 1:
                    raise LinsightError(f"{shown(self.path)} is encrypted: unpack it, and give the folder")
                elif name:
                    self.members[name] = member

    def _read_tar(self) -> None:
        links: dict[str, str] = {}
        with tarfile.open(self.path, "r:") as file:
            try:
                self._read_members(file, links)
            except LinsightError:
                raise
            except _DAMAGE as error:
                if not self.partly or not self.members:
                    raise
                self.torn = _line(error)
        for name in links:
            target, passed = name, set[str]()
            while target in links and target not in passed:  # a link may lead to a link, and in a circle
                passed.add(target)
                target = links[target]
            if target in self.members:
                self.members[name] = self.members[target]
            else:
                self.lost.append(name)

    def _read_members(self, file: tarfile.TarFile, links: dict[str, str]) -> None:
        for member in _members(file):
            name = self._name(member.name)
            self.members.pop(name, None)  # of members of one name, the last is the one that is unpacked
            links.pop(name, None)
            if member.isfile():
                self.members[name] = (member.offset_data, member.size)
            elif member.isdir():
                self.folders.add(name)
            elif member.islnk():
                links[name] = posixpath.normpath(member.linkname).lstrip("/")
            elif member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))

    def _name(self, name: str) -> str:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise LinsightError(f"{shown(self.path)} has a member whose name leads out of it: {shown(name)}")
        return "/".join(parts)


def _members(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Each member of a tar, of which none is kept; raises a ReadError where it is damaged or cut short."""
    before = -1
    kept: Any = file
    while (member := file.next()) is not None:
        kept.members = []  # a thousand bytes each
        if member.size < 0 or member.offset <= before or member.issparse():
            raise tarfile.ReadError(f"member {shown(member.name)} has no plain size")
        before = member.offset
        yield member
    with open(str(file.name), "rb") as raw:
        raw.seek(file.offset)
        if raw.read(_HEADER) != bytes(_HEADER):
            raise tarfile.ReadError(f"cut short or damaged at byte {file.offset}, pack it anew")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
