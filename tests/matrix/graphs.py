"""Checks of the ways out: one graph for all sizes, with the numbers of eager mode."""

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from linsight.ops import Grid

from .subject import Subject

Run = Callable[[Tensor], Any]

SIZES = ((2, 3, 5), (3, 4, 7), (4, 6, 2))  # batch, height, width
# A grid that a graph is made at; and others: larger, both sides prime, flat, and single places.
EXAMPLE, UNSEEN = (2, 4, 5), ((3, 4, 7), (5, 7, 13), (1, 6, 2), (2, 1, 6), (2, 1, 1))
FREE = {0: "batch", 2: "height", 3: "width"}
# What exporters warn of themselves.
WARNINGS = tuple(
    f"ignore:{words}"
    for words in (
        ":torch.jit.TracerWarning",
        ".*torch.jit.*:FutureWarning",
        ".*torch.jit.*:DeprecationWarning",
        ":DeprecationWarning:torch.onnx",
        ":DeprecationWarning:copyreg",
        ".*legacy TorchScript-based ONNX export.*",
        ".*feature was exported.*",
        ".*[oO][nN][nN][xX].*",
        "NOTE. The nodes obtained by tracing:UserWarning",
    )
)


class OnImages(nn.Module):
    """A layer on `(B, C, H, W)`, its grid read off the shape."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        out = self.layer(x.flatten(2).transpose(1, 2), Grid(height, width))
        return out.transpose(1, 2).unflatten(2, (height, width))


def compiled(model: nn.Module, x: Tensor) -> Run:
    """By torch.compile, of one graph."""
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    run(x)
    return run


def exported(model: nn.Module, x: Tensor, strict: bool = False) -> Run:
    """By torch.export; how tensors lay in memory in the example is no condition."""
    dims = dict.fromkeys(FREE, torch.export.Dim.DYNAMIC)
    return torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=strict).module(check_guards=False)


def in_onnxruntime(model: nn.Module, x: Tensor) -> Run:
    """By onnxruntime, of a model exported as everyone does: with gradients recorded."""
    return _session(model, x, dynamo=True, dynamic_shapes=(FREE,), verbose=False)


def in_onnxruntime_by_tracing(model: nn.Module, x: Tensor) -> Run:
    """By onnxruntime, exported as it was done before torch.export."""
    return _session(model, x, dynamo=False, opset_version=17, dynamic_axes={"x": FREE})


def traced(model: nn.Module, x: Tensor) -> Run:
    """By TorchScript."""
    with torch.no_grad():
        return torch.jit.trace(model, x, check_trace=False)


def _session(model: nn.Module, x: Tensor, **how: Any) -> Run:
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        program = torch.onnx.export(model, (x,), None if how["dynamo"] else file, input_names=["x"], **how)
        if program is not None:
            program.save(file)
    session = runtime.InferenceSession(file.getvalue())

    def run(x: Tensor) -> list[Tensor] | Tensor:
        outs = [torch.from_numpy(out) for out in session.run(None, {"x": x.numpy()})]
        return outs if len(outs) > 1 else outs[0]

    return run


# By the names of `linsight.attention.WAYS`: a graph of a model that was made with an example.
BY_WAY = {"compile": compiled, "export": exported, "onnx": in_onnxruntime, "trace": traced}


def equals(run: Run, model: nn.Module, channels: int, shapes: Iterable[tuple[int, int, int]]) -> None:
    """`run` answers as `model` does, to 1e-4 of the largest number."""
    for batch, *size in shapes:
        x = torch.randn(batch, channels, *size)
        with torch.no_grad():
            right, found = model(x), run(x)
        pairs = zip(*(out if isinstance(out, list | tuple) else [out] for out in (found, right)), strict=True)
        for ours, eager in pairs:
            assert ours.shape == eager.shape
            assert (ours - eager).abs().max() <= 1e-4 * eager.abs().max(), (batch, *size)


def compile_parity(subject: Subject, backend: str, gradients: bool = True) -> None:
    """Outputs, and gradients, of the compiled layer are those of the eager one, at several sizes."""
    torch._dynamo.reset()
    model = OnImages(subject.layer())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    floats_are_constants = torch._dynamo.config.patch(specialize_float=True)  # or all is traced twice
    for batch, height, width in SIZES:
        x = torch.randn(batch, 16, height, width)
        results = []
        for run in (model, compiled):
            leaf = x.clone().requires_grad_(gradients)
            model.zero_grad()
            with floats_are_constants, torch.set_grad_enabled(gradients):
                out = run(leaf)
            if gradients:
                out.square().sum().backward()
            results.append([out, leaf.grad, *(p.grad for p in model.parameters())])
        for ours, eager in zip(*reversed(results), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1, f"{counter.frame_count} graphs for {len(SIZES)} sizes"


def compiles_without_breaks(subject: Subject) -> None:
    """torch.compile, the whole layer in one dynamic graph."""
    compile_parity(subject, "aot_eager")


def exports_with_dynamic_sizes(subject: Subject) -> None:
    """torch.export with dynamic batch, height and width."""
    model = OnImages(subject.layer()).eval()
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(model, (torch.randn(EXAMPLE[0], 16, *EXAMPLE[1:]),), dynamic_shapes=(dims,))
    equals(program.module(check_guards=False), model, 16, UNSEEN)


def runs_in_onnxruntime(subject: Subject) -> None:
    """ONNX with dynamic batch, height and width."""
    _leaves(subject, in_onnxruntime)


def runs_in_torchscript(subject: Subject) -> None:
    """A trace of one image, for any batch, height and width."""
    _leaves(subject, traced, batch=1)


def _leaves(subject: Subject, way: Callable[[nn.Module, Tensor], Run], batch: int = EXAMPLE[0]) -> None:
    model = OnImages(subject.layer()).eval()
    equals(way(model, torch.randn(batch, 16, *EXAMPLE[1:])), model, 16, UNSEEN)


# By the names of `linsight.attention.WAYS`: the check of a layer.
CHECKS = {
    "compile": compiles_without_breaks,
    "export": exports_with_dynamic_sizes,
    "onnx": runs_in_onnxruntime,
    "trace": runs_in_torchscript,
}
