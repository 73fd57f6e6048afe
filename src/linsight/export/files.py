"""What travels with an exported file, and opening one again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linsight.errors import CheckpointError, LinsightError, MissingExtraError

KEY = "linsight"  # of the metadata, JSON


class Facts(NamedTuple):
    """What a file says of itself.

    model: its name.  classes: their names, in the order of the outputs; () where unknown.
    input_size: channels, height and width.  mean, std: of each channel, in 0..1.
    dynamic: batch, height and width are free.  pixels: the graph takes uint8 `(B, H, W, C)`, and gives probabilities.
    recipe: the fields by which a run rebuilds its model and prepares images; {} of no run.
    """

    model: str = ""
    classes: tuple[str, ...] = ()
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dynamic: bool = True
    pixels: bool = False
    recipe: Mapping[str, Any] = {}

    def dumps(self) -> str:
        """The facts as JSON."""
        return json.dumps(self._asdict(), allow_nan=False)

    @classmethod
    def loads(cls, text: str, path: Path) -> "Facts":
        """The facts of the file `path`.

        Raises:
            CheckpointError: it has none, or not such.
        """
        try:
            given = json.loads(text)
            lists = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
            return cls(**lists)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{path}' was not exported by linsight: it does not say what it takes") from error


class Opened(NamedTuple):
    """An exported model: `model` takes a tensor, and gives one, or a list of them."""

    model: nn.Module
    facts: Facts


class OnnxModel(nn.Module):
    """A session of onnxruntime as a module.

    Args:
        content: a file, or what is in it.
        threads: of one operator; None: as many as torch uses.
    """

    def __init__(self, content: Path | bytes, threads: int | None = None) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "export", "running ONNX files") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        given = content if isinstance(content, bytes) else str(content)
        self.session = onnxruntime.InferenceSession(given, options, providers=onnxruntime.get_available_providers())
        self.input = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """The outputs of the graph, on the CPU."""
        outputs: Sequence[Any] = self.session.run(None, {self.input: x.detach().cpu().contiguous().numpy()})
        tensors = [torch.from_numpy(output) for output in outputs]
        return tensors[0] if len(tensors) == 1 else tensors

    def metadata(self) -> str:
        """What the file says of itself, as JSON; "" for one of others."""
        return self.session.get_modelmeta().custom_metadata_map.get(KEY, "")


def open_exported(path: str | Path) -> Opened:
    """An exported model: `.onnx` by onnxruntime, `.pt2` by torch.

    Raises:
        CheckpointError: no such file, damaged, or not exported by linsight.
        MissingExtraError: onnxruntime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: '{path}'")
    readers = {".onnx": _open_onnx, ".pt2": _open_program}
    if path.suffix not in readers:
        raise LinsightError(f"'{path}' is no exported model by its name: {', '.join(readers)} are")
    try:
        return readers[path.suffix](path)
    except LinsightError:
        raise
    except Exception as error:  # of other libraries, for damaged files
        raise CheckpointError(f"'{path}' cannot be read: {' '.join(str(error).split())[:200]}") from error


def _open_onnx(path: Path) -> Opened:
    model = OnnxModel(path)
    return Opened(model, Facts.loads(model.metadata(), path))


def _open_program(path: Path) -> Opened:
    texts = {KEY: ""}
    program = torch.export.load(str(path), extra_files=texts)
    return Opened(program.module(), Facts.loads(texts[KEY], path))
