"""Reading a checkpoint file: safetensors, or PyTorch's formats without running what is in them.

A pickled checkpoint may name any Python object, which an unsafe reader would call. Here the names in
`STAND_INS` are replaced by empty stand-ins; any other one ends the reading.
"""

import hashlib
import http.client
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open

from linsight.attention.on_grid import GRIDS
from linsight.errors import CheckpointError
from linsight.models import ARCHITECTURES, HOSTS, VARIANTS, default_config
from linsight.runtime.places import located

from ._kinds import about_address, about_archive, about_file, about_folder, missing_bytes
from .unwrap import IMG_SIZE


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
    try:
        scheme = urlparse(str(source)).scheme
    except ValueError as error:
        raise CheckpointError(f"{source} is no address: {error}") from None
    if scheme not in ("http", "https"):
        way = about_address(str(source))
        if way:
            raise CheckpointError(f"'{source}' is no file: {way}")
        return _read_file(located(source))
    path = _download(str(source))
    try:
        return _read_file(path)
    except CheckpointError as error:
        path.unlink(missing_ok=True)  # an error page must not stay in the cache
        other = re.sub("/blob/", "/resolve/", str(source), count=1)
        way = f"; the file itself may be {other}" if other != str(source) else ""
        raise CheckpointError(f"{source}: {error}{way}") from None


def _download(url: str) -> Path:
    # The address is part of the name: every second repository calls its file "checkpoint.pth".
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{digest}-{PurePosixPath(urlparse(url).path).name or 'checkpoint'}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:  # some for no address at all
            way = "fetch it elsewhere, and pass the path of the file"
            raise CheckpointError(f"{url} could not be downloaded: {error}; {way}") from None
    return path


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is no file of a disk, but a pipe or a device")
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}: there is no such file") from None
    except OSError as error:
        folder = about_folder(path) if path.is_dir() else f"cannot be read: {error.strerror}"
        raise CheckpointError(f"{path} {folder}") from None
    if not head:
        raise CheckpointError(f"{path} is empty: the download or the copy did not finish, fetch it again")
    text = head.startswith(b"{") and b"\0" not in head[:8]
    if head[8:9] == b"{" and not head.startswith(_ZIP) and not text:  # 8 bytes of length, then JSON
        return _safetensors(path)
    if head.startswith((_ZIP, _PICKLE)):
        return _pickled(path, mmap=head.startswith(_ZIP))
    raise CheckpointError(f"{path} is no checkpoint: it is {about_file(path, head)}")


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            about = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        short = missing_bytes(path)
        if short:
            raise CheckpointError(f"{path} is cut short, {short}: fetch it again") from None
        raise CheckpointError(f"{path} is a damaged safetensors file: {error}") from None
    tensors._metadata = {"": _record(about.get("linsight", ""))}  # type: ignore[attr-defined]
    return tensors


def _record(text: str) -> dict[str, Any]:
    """The grids and the size of images that linsight wrote into a safetensors file, as in torch's metadata."""
    try:
        about = json.loads(text) if text else {}
        recipe = about.get("recipe") or {}
        size, name = recipe.get("img_size"), str(recipe.get("model"))
    except (ValueError, AttributeError, RecursionError):
        return {}
    if not size and name in {*VARIANTS, *HOSTS, *ARCHITECTURES}:
        size = default_config(name)["input_size"][-2:]
    if isinstance(size, list | tuple) and len(size) == 1:
        size = size[0]
    return {GRIDS: about.get(GRIDS), IMG_SIZE: size}


def _pickled(path: Path, *, mmap: bool) -> Mapping[str, Any]:
    try:
        stand_ins: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of old formats and of what is then refused
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
        about = about_archive(path) if mmap else "is no PyTorch checkpoint, or is damaged or cut short: fetch it again"
        raise CheckpointError(f"{path} {about}") from None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict")
    return found
