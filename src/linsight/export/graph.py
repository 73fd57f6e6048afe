"""Operators of ONNX graphs that its runtimes are quick with, in place of what torch's exporter makes of plain forms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linsight.ops import dynamic_depthwise_conv, exported_forms, use_form


@torch.library.custom_op("linsight::conv_of_each", mutates_args=())
def conv_of_each(x: Tensor, height: int, width: int, kernels: Tensor) -> Tensor:
    """As `dynamic_depthwise_conv` of `x` `(B, H*W, C)` and `kernels` `(B, C, k, k)`: the name of it in a graph."""
    with use_form("plain"):
        return dynamic_depthwise_conv(x, (height, width), kernels).clone()


@conv_of_each.register_fake
def _(x: Tensor, height: int, width: int, kernels: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=kernels.dtype, memory_format=torch.contiguous_format)


def _leave_conv(x: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
    return conv_of_each(x.to(kernels.dtype), *size, kernels)


def _scan_conv(x: Any, height: Any, width: Any, kernels: Any) -> Any:
    """A convolution of each image, one after the other: no number of groups is then that of a batch.

    Nine shifted products, the plain form, take two to four times as long: each is a pass over memory.
    """
    import onnx_ir as ir
    from onnxscript import onnx_opset

    op: Any = onnx_opset.opset18  # the oldest that torch writes
    channels, side = int(kernels.shape[1]), int(kernels.shape[3])
    pads = [side // 2] * 4

    def node(kind: str, inputs: list[Any], **attributes: Any) -> Any:
        nodes.append(ir.node(kind, inputs, attributes or None))
        return nodes[-1].outputs[0]

    nodes: list[Any] = []
    image = ir.val("image", ir.DataType(x.dtype), ir.Shape([None, None, channels]))
    kernel = ir.val("kernel", ir.DataType(kernels.dtype), ir.Shape([channels, side, side]))
    first = node("Constant", [], value_ints=[0])
    second = node("Constant", [], value_ints=[1])
    canvas = node("Unsqueeze", [node("Transpose", [image], perm=[2, 0, 1]), first])
    weight = node("Unsqueeze", [kernel, second])
    out = node("Conv", [canvas, weight], group=channels, pads=pads)
    out = node("Transpose", [node("Squeeze", [out, first])], perm=[1, 2, 0])
    out.type, out.shape = ir.TensorType(ir.DataType(kernels.dtype)), ir.Shape([None, None, channels])
    body = ir.Graph([image, kernel], [out], nodes=nodes, name="conv_of_each")
    sides = [op.Reshape(op.Cast(side, to=7), op.Constant(value_ints=[-1])) for side in (height, width)]
    grid = op.Concat(op.Constant(value_ints=[0]), *sides, op.Constant(value_ints=[channels]), axis=0)
    images = op.Scan(op.Reshape(x, grid), kernels, body=body, num_scan_inputs=2)
    return op.Reshape(images, op.Constant(value_ints=[0, -1, channels]))


def _whole_division(x: Any, by: Any, rounding_mode: str | None = None) -> Any:
    """Whole numbers divided by whole ones, exactly: torch's form goes through float32, which ends at 16,777,216."""
    from onnxscript import onnx_opset
    from onnxscript.function_libs.torch_lib.ops.core import aten_div_mode

    op: Any = onnx_opset.opset18
    if rounding_mode != "floor" or not x.dtype.is_integer():
        return aten_div_mode(x, by, rounding_mode)
    return op.Div(op.Sub(x, op.Mod(x, by)), by)


FORMS: dict[str, Callable[..., Any]] = {"dynamic_depthwise_conv": _leave_conv}


def onnx_program(model: nn.Module, inputs: tuple[Tensor, ...], **how: Any) -> Any:
    """`torch.onnx.export`, with the forms of this file."""
    table: dict[Any, Callable[..., Any]] = {
        torch.ops.linsight.conv_of_each.default: _scan_conv,
        torch.ops.aten.div.Tensor_mode: _whole_division,
    }
    with exported_forms(FORMS):
        return torch.onnx.export(model, inputs, dynamo=True, custom_translation_table=table, **how)
