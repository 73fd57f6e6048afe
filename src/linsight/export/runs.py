"""Exported files as modules: sessions of onnxruntime, and programs of torch.export."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from linsight.errors import LinsightError, MissingExtraError
from linsight.runtime.text import printable

from .facts import KEY

T = TypeVar("T")
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
}
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # where both are, the first


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, libraries neither warn nor log: what goes wrong is said in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def one_line(error: BaseException) -> str:
    """The reason behind an error of another library, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), type(error).__name__)
    return printable(text[:300])


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
        here = onnxruntime.get_available_providers()
        self.session = onnxruntime.InferenceSession(
            given, options, providers=[provider for provider in _PROVIDERS if provider in here]
        )
        self.input = self.session.get_inputs()[0]

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """The outputs of the graph, on the CPU.

        Raises:
            LinsightError: the graph takes another dtype or shape.
        """
        sides = [side if isinstance(side, int) else None for side in self.input.shape]
        require_input(x, _DTYPES.get(self.input.type), sides)
        given = {self.input.name: x.detach().cpu().contiguous().numpy()}
        outputs: Sequence[Any] = _answered(x, lambda: self.session.run(None, given))
        tensors = [torch.from_numpy(output) for output in outputs]
        return tensors[0] if len(tensors) == 1 else tensors

    def metadata(self) -> str:
        """The facts in the file, as JSON; "" for one of others."""
        return self.session.get_modelmeta().custom_metadata_map.get(KEY, "")


class ProgramModel(nn.Module):
    """A program of torch.export as a module, which keeps to its own precision.

    Args:
        program: a loaded one.
        dtype, sides: of its input; None for a side that is free.
    """

    def __init__(self, program: torch.export.ExportedProgram, dtype: torch.dtype, sides: Sequence[int | None]) -> None:
        super().__init__()
        # Torch notes how tensors lay in memory in the example, and would refuse sizes where they lie otherwise, such as
        # a batch of one, though it answers them right: files are checked by their answers.
        module = program.module(check_guards=False)
        self.run: Callable[[Tensor], Any] = lambda x: module(x)  # which has no eval(), so that it is no part
        self.dtype, self.sides = dtype, sides

    def forward(self, x: Tensor) -> Any:
        """The outputs of the program, on the CPU.

        Raises:
            LinsightError: it takes another dtype or shape.
        """
        require_input(x, self.dtype, self.sides)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _answered(x, lambda: self.run(x.detach().cpu()))


def _answered(x: Tensor, run: Callable[[], T]) -> T:
    """The result of `run`; what a library raises is a LinsightError of one line."""
    try:
        return run()
    except Exception as error:
        raise LinsightError(f"this file does not take images of {_sides(x.shape)}: {one_line(error)}") from error


def _sides(sides: Sequence[int | None]) -> str:
    return ", ".join("any" if side is None else str(side) for side in sides)


def require_input(x: Tensor, dtype: torch.dtype | None, sides: Sequence[int | None]) -> None:
    """Raise a LinsightError unless an input has this dtype and these sides, of which None are free."""
    taken = _sides(sides)
    name = str(dtype).removeprefix("torch.")
    if not isinstance(x, Tensor):
        raise LinsightError(f"this file takes a tensor of {name} ({taken}): a {type(x).__name__} came")
    fits = x.ndim == len(sides) and all(side in (None, own) for side, own in zip(sides, x.shape, strict=True))
    if not fits or dtype not in (None, x.dtype):
        given = f"{str(x.dtype).removeprefix('torch.')} ({_sides(x.shape)})"
        raise LinsightError(f"this file takes {name} ({taken}): {given} came")
