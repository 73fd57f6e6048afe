"""Reading a checkpoint file: safetensors, or PyTorch's formats without running what is in them.

A pickled checkpoint may name any Python object, which an unsafe reader would call. Here the names in
`STAND_INS` are replaced by empty stand-ins; any other one ends the reading.
"""

import hashlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from linsight.errors import CheckpointError


class _Blank:
    """Stands in for an object whose state does not matter."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _nothing(*args: Any) -> None:
    """Stands in for a function."""


# Names that scripts pickle beside the weights. OrderedDict is the one mapping that PyTorch's safe reader fills.
STAND_INS: dict[str, Any] = {
    "yacs.config.CfgNode": OrderedDict,
    "fvcore.common.config.CfgNode": OrderedDict,
    "easydict.EasyDict": OrderedDict,
    "addict.addict.Dict": OrderedDict,
    "mmengine.config.config.ConfigDict": OrderedDict,
    "argparse.Namespace": OrderedDict,
    "types.SimpleNamespace": OrderedDict,
    "pathlib.PosixPath": _nothing,
    "pathlib.WindowsPath": _nothing,
    "numpy.dtype": _Blank,
    "numpy.core.multiarray.scalar": _nothing,
    "numpy._core.multiarray.scalar": _nothing,
}

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_OFFENDER = re.compile(r"GLOBAL (\S+)")


def read(source: str | Path) -> Mapping[str, Any]:
    """The content of a checkpoint: a file, or an http(s) address, which is downloaded once.

    Raises:
        CheckpointError: there is no such file, it is damaged, no checkpoint, or not safe to read.
    """
    if urlparse(str(source)).scheme not in ("http", "https"):
        return _read_file(Path(source).expanduser())
    path = _download(str(source))
    try:
        return _read_file(path)
    except CheckpointError as error:
        path.unlink(missing_ok=True)  # an error page must not stay in the cache
        raise CheckpointError(f"{source}: {error}") from None


def _download(url: str) -> Path:
    # The address is part of the name: every second repository calls its file "checkpoint.pth".
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{digest}-{PurePosixPath(urlparse(url).path).name or 'checkpoint'}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise CheckpointError(f"{url} could not be downloaded: {error}") from None
    return path


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path} is empty")
    if head[8:] == b"{" and not head.startswith(_ZIP):  # 8 bytes of length, then JSON
        return _safetensors(path)
    if head.startswith((_ZIP, _PICKLE)):
        return _pickled(path, mmap=head.startswith(_ZIP))
    raise CheckpointError(f"{path} is no checkpoint: neither safetensors nor a PyTorch file")


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged safetensors file: {error}") from None


def _pickled(path: Path, *, mmap: bool) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        offender = _OFFENDER.search(str(error))
        if offender:
            raise CheckpointError(
                f"{path} holds the Python object '{offender[1]}', which is not read: it could run code; "
                f"ask for the weights alone, best as safetensors"
            ) from None
        raise CheckpointError(f"{path} is damaged, or holds Python objects beside tensors") from None
    except Exception:  # whatever a broken archive makes the reader raise
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or is damaged or cut short") from None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found
