"""Operators of ONNX graphs that are quick: the same numbers as the plain forms, at any batch and size."""

import pytest
import torch
from torch import nn

from linsight.export.graph import onnx_program
from linsight.ops import dynamic_depthwise_conv, exported_forms, shifted_products

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore"),
]  # a machine that is busy; torch's warnings


class Convolution(nn.Module):
    """Kernels `(B, C, k, k)` for images `(B, H, W, C)`, made of their mean."""

    def __init__(self, side, dtype=torch.float32):
        super().__init__()
        self.side, self.maps = side, nn.Linear(4, 4 * side * side, dtype=dtype)

    def forward(self, x):
        kernels = self.maps(x.mean(dim=(1, 2))).unflatten(1, (4, self.side, self.side))
        return dynamic_depthwise_conv(x.flatten(1, 2), (x.shape[1], x.shape[2]), kernels)


@pytest.mark.parametrize("side", [3, 5])
def test_a_kernel_for_each_image(side):
    """One node for all images, and no pass over memory for each tap."""
    model = Convolution(side)
    free = {0: "batch", 1: "height", 2: "width"}
    with torch.no_grad():
        program = onnx_program(
            model, (torch.randn(2, 6, 7, 4),), dynamic_shapes=(free,), opset_version=20, verbose=False
        )
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count("Scan") == 1 and "Slice" not in kinds and "Pad" not in kinds
    run = runtime.InferenceSession(program.model_proto.SerializeToString())
    for shape in ((1, 6, 7, 4), (3, 5, 11, 4), (2, 1, 1, 4), (2, 1, 13, 4)):
        x = torch.randn(shape)
        with torch.no_grad():
            kernels = model.maps(x.mean(dim=(1, 2))).unflatten(1, (4, side, side))
            wanted = shifted_products(x.flatten(1, 2), shape[1:3], kernels)
        (found,) = run.run(None, {run.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)


def test_other_graphs_have_the_plain_form():
    """A package of torch.export holds torch's own operators, and so does what others export."""
    free = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)

    def operators():
        with torch.no_grad():
            program = torch.export.export(Convolution(3), (torch.randn(2, 6, 7, 4),), dynamic_shapes=(free,))
        return {str(node.target) for node in program.graph.nodes if "conv_of_each" in str(node.target)}

    calls = []

    def counted(x, size, kernels):
        calls.append(size)
        return x

    assert operators() == set()
    with exported_forms({"dynamic_depthwise_conv": counted}):
        x = torch.randn(1, 4, 4)
        dynamic_depthwise_conv(x, (2, 2), torch.randn(1, 4, 3, 3))
        assert calls == []  # nothing is exported
        operators()
    assert len(calls) == 1
    assert operators() == set() and len(calls) == 1
