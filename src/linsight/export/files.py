"""Opening an exported file again, without running what is in it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from linsight.errors import CheckpointError, LinsightError, MissingExtraError
from linsight.runtime.places import located
from linsight.runtime.text import printable

from .archive import read_program
from .facts import KEY, Facts
from .runs import OnnxModel, ProgramModel, one_line, quiet

SUFFIXES = (".onnx", ".pt2")


class Opened(NamedTuple):
    """An exported model: `model` takes a tensor, and gives one, or a list of them."""

    model: nn.Module
    facts: Facts


def open_exported(path: str | Path) -> Opened:
    """An exported model: `.onnx` by onnxruntime, `.pt2` of torch.export by torch.

    Nothing in the file is run but its graph. Files of AOTInductor are machine code, and are not opened here.

    Raises:
        CheckpointError: no such file, damaged, not safe to read, or not exported by linsight.
        LinsightError: neither of these by its name.
        MissingExtraError: onnxruntime is not installed.
    """
    path = located(path)
    if not path.is_file():
        raise CheckpointError(f"'{path}' is a folder" if path.is_dir() else f"no such file: '{path}'")
    readers = dict(zip(SUFFIXES, (_open_onnx, _open_program), strict=True))
    if path.suffix.lower() not in readers:
        raise LinsightError(f"'{path}' is no exported model by its name: {', '.join(SUFFIXES)} are")
    try:
        with quiet():
            return readers[path.suffix.lower()](path)
    except LinsightError:
        raise
    except Exception as error:  # of other libraries, for damaged files
        raise CheckpointError(f"'{path}' cannot be read: {one_line(error)}") from error


def _open_onnx(path: Path) -> Opened:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "reading ONNX files") from error
    model = onnx.load(str(path), load_external_data=False)
    for tensor in _tensors(model, onnx.TensorProto):
        _require_beside(tensor, path)
    facts = Facts.loads({entry.key: entry.value for entry in model.metadata_props}.get(KEY, ""), path)
    return Opened(OnnxModel(path), facts)


def _tensors(message: Any, kind: type) -> Iterator[Any]:
    """All tensors in a message of protobuf, however deep: of functions and inner graphs, too."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if isinstance(part, kind):
                yield part
            else:
                yield from _tensors(part, kind)


def _require_beside(tensor: Any, path: Path) -> None:
    """Raise unless a tensor lies in the file, or in the one that linsight writes beside it."""
    if tensor.data_location != tensor.EXTERNAL:
        return
    place = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
    beside = data_of(path)
    if place != beside.name or beside.is_symlink():
        raise CheckpointError(
            f"'{path}' has weights in another file, '{printable(place)}', which is not read: of files beside it, only "
            f"'{beside.name}' is"
        )
    if not beside.is_file():
        raise CheckpointError(f"'{path}' lacks the file of its weights, '{beside.name}', which belongs beside it")


def data_of(path: Path) -> Path:
    """The file beside an ONNX file that has its weights, where they are too large for one."""
    return path.with_name(f"{path.name}.data")


def _open_program(path: Path) -> Opened:
    program, text = read_program(path)
    facts = Facts.loads(text, path)
    return Opened(program_model(program, facts), facts)


def program_model(program: torch.export.ExportedProgram, facts: Facts) -> ProgramModel:
    """A program with the check of its input that its facts ask for."""
    channels, *size = facts.input_size
    sides: list[int | None] = [None, None, None] if facts.dynamic else [1, *size]
    if facts.single:
        sides[0] = 1
    sides.insert(3 if facts.pixels else 1, channels)
    return ProgramModel(program, torch.uint8 if facts.pixels else getattr(torch, facts.dtype), sides)
