"""Checks of compiled and exported forms: one graph for all sizes, with the numbers of eager mode."""

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from linsight.ops import Grid

from .subject import Subject

SIZES = ((2, 3, 5), (3, 4, 7), (4, 6, 2))  # batch, height, width


class OnImages(nn.Module):
    """A layer on `(B, C, H, W)`, its grid read off the shape."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        out = self.layer(x.flatten(2).transpose(1, 2), Grid(height, width))
        return out.transpose(1, 2).unflatten(2, (height, width))


def compile_parity(subject: Subject, backend: str) -> None:
    """Outputs and gradients of the compiled layer are those of the eager one, at several sizes."""
    torch._dynamo.reset()
    model = OnImages(subject.layer())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    floats_are_constants = torch._dynamo.config.patch(specialize_float=True)  # or all is traced twice
    for batch, height, width in SIZES:
        x = torch.randn(batch, 16, height, width)
        results = []
        for run in (model, compiled):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            with floats_are_constants:
                out = run(leaf)
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
    model = OnImages(subject.layer())
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(model, (torch.randn(2, 16, 4, 5),), dynamic_shapes=(dims,))
    for batch, height, width in SIZES:
        x = torch.randn(batch, 16, height, width)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
