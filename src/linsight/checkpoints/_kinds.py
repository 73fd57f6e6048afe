"""Files that are no checkpoint: a line that says what they are, and what to do."""

import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of file, by the bytes at `place`.  about: the thing, and the way out."""

    start: bytes
    about: str
    place: int = 0


_UNPACK = "an archive: unpack it, and pass the file in it"
_OTHER = "of another framework: convert it there to PyTorch or safetensors"
_KINDS = (
    Kind(b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with 'git lfs pull' where it lies"),
    Kind(b"\x1f\x8b", _UNPACK),
    Kind(b"BZh", _UNPACK),
    Kind(b"\xfd7zXZ", _UNPACK),
    Kind(b"7z\xbc\xaf", _UNPACK),
    Kind(b"Rar!", _UNPACK),
    Kind(b"\x28\xb5\x2f\xfd", _UNPACK),
    Kind(b"ustar", _UNPACK, 257),
    Kind(b"\x89HDF", f"an HDF5 file {_OTHER}"),
    Kind(b"\x93NUMPY", f"a NumPy array, or weights {_OTHER}"),
    Kind(b"GGUF", "a GGUF file of quantised weights: take those before quantisation"),
    Kind(b"\x89PNG", "a picture"),
    Kind(b"\xff\xd8\xff", "a picture"),
    Kind(b"%PDF", "a PDF document"),
)
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def about_file(path: Path, head: bytes) -> str:
    """The kind of a file that begins with `head`, where it is neither safetensors nor PyTorch's."""
    for kind in _KINDS:
        if head[kind.place :].startswith(kind.start):
            return kind.about
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--", b"<")):
        return "a web page: the address leads to a page about the file, download the file itself"
    if not head.strip(b"\0"):
        return "all zeros: the download did not finish, fetch it again"
    if text.startswith((b"{", b"[")):
        if path.name.endswith(".index.json"):
            return "the index of weights in several files: pass a state dict that joins them"
        return "JSON: pass the file of the weights"
    if path.suffix.lower() == ".onnx":
        return "an ONNX model: pass the PyTorch weights that it was made of"
    return "neither safetensors nor a PyTorch file"


def about_archive(path: Path) -> str:
    """The kind of a zip archive that PyTorch does not read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError):
        size = path.stat().st_size
        return f"is no PyTorch checkpoint, or is damaged or cut short ({size} bytes): fetch it again"
    except Exception:  # damaged data make decompressors raise errors of their own
        return "is damaged: fetch it again"
    if any(name.endswith("constants.pkl") for name in names):
        return "is a TorchScript program: save the state dict of the model that it was made of"
    if not any(name.endswith("data.pkl") for name in names):
        kind = f"a NumPy file {_OTHER}" if names and all(n.endswith(".npy") for n in names) else _UNPACK
        return f"is no PyTorch checkpoint but {kind}"
    return f"is damaged ('{damaged}'): fetch it again" if damaged else "is no PyTorch checkpoint, or is damaged"


def about_folder(path: Path) -> str:
    """A line on a folder, with the file to pass in its place."""
    names = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHTS)
    way = f"pass a file in it, as '{path / names[0]}'" if names else "pass a file of weights"
    return f"cannot be read: it is a folder; {way}"


def missing_bytes(path: Path) -> str:
    """How much of a safetensors file is there, where it is cut short; empty where it is whole, or no such file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, size))
        if len(header) < length:
            return f"{size} of more than {8 + length} bytes" if length < 10**8 else ""
        offsets = [about["data_offsets"][1] for name, about in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + length + max(offsets, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return ""
    return f"{size} of {whole} bytes" if isinstance(whole, int) and size < whole else ""


_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)


def about_address(source: str) -> str:
    """The way from an address that is not of the web to a file; empty for a path."""
    found = _SCHEME.match(source)
    if not found or Path(source).exists():
        return ""
    if found[1].lower() in ("hf-hub", "hf_hub", "hf"):
        return "fetch it first, as huggingface_hub.hf_hub_download(repository, file) does, and pass that path"
    if source[found.end() :].startswith("//") or found[1].lower() in ("local-dir", "timm"):
        return "pass a path, or an http(s) address"
    return ""
