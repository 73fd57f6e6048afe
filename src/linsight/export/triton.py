"""A model repository of the Triton Inference Server around an ONNX file."""

import re
import shutil
from pathlib import Path
from typing import Any

from linsight.errors import LinsightError, MissingExtraError
from linsight.runtime.files import replacing, to_json, write_text, writing

from .files import open_exported

_TYPES = {"FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "DOUBLE": "TYPE_FP64", "UINT8": "TYPE_UINT8"}
_TYPES |= {"INT16": "TYPE_INT16", "INT64": "TYPE_INT64", "BOOL": "TYPE_BOOL"}  # of masks and objects
_LABELS = "labels.txt"
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def write_triton(
    path: str | Path,
    repository: str | Path,
    *,
    name: str | None = None,
    version: int = 1,
    max_batch: int = 8,
    delay: int = 1000,
) -> Path:
    """Put the ONNX file `path`, exported by linsight, into a model repository, and return the folder of the model.

    It has `config.pbtxt`, `VERSION/model.onnx` and, where the file names its classes, `labels.txt`. Requests of images
    of one size are joined to batches, where the file takes any batch.

    Args:
        path: the file.
        repository: the folder that Triton is given; it is made if it is not there.
        name: of the model on the server; by default, that of the file.
        version: of the model; one that is there already is not written over.
        max_batch: images of a batch at most.
        delay: microseconds that a request waits for others.

    Raises:
        LinsightError: no ONNX file of linsight, a name that is no folder's, or a version that is there.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "reading ONNX files") from error
    path = Path(path)
    if path.suffix != ".onnx":
        raise LinsightError(f"'{path}' is no ONNX file by its name: export one with --onnx")
    facts = open_exported(path).facts
    name = path.stem if name is None else name
    if not _NAME.fullmatch(name):
        raise LinsightError(f"'{name}' cannot name a model on a server: give a name of letters, digits, _, - and dots")
    folder = Path(repository) / name
    place = folder / str(version) / "model.onnx"
    if place.exists():
        raise LinsightError(f"'{place}' is there already: give the next version, {version + 1}")
    graph = onnx.load(str(path), load_external_data=False).graph
    free = all(value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output))
    ports = [f"input [ {_port(value, free, 0)} ]" for value in graph.input]
    ports += [f"output [ {_port(value, free, len(facts.classes))} ]" for value in graph.output]
    lines = [
        f"name: {to_json(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch if free else 0}",
        *ports,
    ]
    if free:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}")
    with writing(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.pbtxt", "\n".join(lines) + "\n")
        if facts.classes:
            write_text(folder / _LABELS, "".join(f"{' '.join(each.split())}\n" for each in facts.classes))
        data = path.with_name(f"{path.name}.data")  # of large models, found by its name
        if data.exists():
            shutil.copyfile(data, place.with_name(data.name))
        with replacing(place) as temporary:  # last: a server that watches the folder takes what is there
            shutil.copyfile(path, temporary)
    return folder


def _port(value: Any, free: bool, classes: int) -> str:
    """An input or output of the graph as Triton describes it: without its batch, -1 where a size is free."""
    import onnx

    tensor = value.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim][int(free) :]
    kind = _TYPES[onnx.TensorProto.DataType.Name(tensor.elem_type)]
    labels = f" label_filename: {to_json(_LABELS)}" if classes and sizes[-1:] == [classes] else ""
    return f"{{ name: {to_json(value.name)} data_type: {kind} dims: {sizes}{labels} }}"
