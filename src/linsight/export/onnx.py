"""ONNX files, by torch's exporter, run by onnxruntime before they are kept."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from linsight.errors import MissingExtraError
from linsight.runtime.files import replacing

from .files import KEY, Facts, OnnxModel
from .trace import Traced, traced
from .verify import TOLERANCE, Exported, compare

OPSET = 20


def export_onnx(
    model: nn.Module, path: str | Path, *, facts: Facts | None = None, opset: int = OPSET, tolerance: float = TOLERANCE
) -> Exported:
    """Write `model` as an ONNX file, and compare what onnxruntime makes of it with the model.

    The graph has one input, `images`, and the outputs `output`, or `output_0` and so on. Batch, height and width are
    free, unless `facts` say otherwise, and the file is checked at three of each that the export did not see.

    Args:
        model: of images `(B, C, H, W)`, or of pixels, as a `Served`. Sums over tokens stay in float32 in half models.
        path: where the file will be; it stays as it was if the export fails.
        facts: what the file will say of itself; by default, what the model's `pretrained_cfg` says.
        opset: of ONNX.
        tolerance: the largest error that is accepted, as a share of the largest number that the model answers.

    Raises:
        LinsightError: the model cannot be exported so, or the file answers otherwise than the model.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "export", "exporting to ONNX")
    path = Path(path)
    with traced(model, facts) as of, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own insides
        program: Any = of.attempt("ONNX", lambda: _program(of, opset))
        program.model.metadata_props[KEY] = of.facts.dumps()
        with replacing(path) as temporary:
            program.save(temporary)
            run = OnnxModel(temporary)
            checks = compare(of.model, lambda x: tree_leaves(run(x)), of.inputs, tolerance, "the ONNX file")
    return Exported(path, f"ONNX, opset {opset}", checks)


def _program(of: Traced, opset: int) -> Any:
    outputs = len(tree_leaves(of.model(of.example)))
    names = ["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)]
    return torch.onnx.export(
        of.model,
        (of.example,),
        dynamo=True,
        dynamic_shapes=(of.dims,) if of.dims else None,
        opset_version=opset,
        input_names=["images"],
        output_names=names,
        verbose=False,
    )


def nodes_of_sums(path: str | Path) -> list[str]:
    """Names of the nodes of a half-precision file that compute in float32: those behind a cast to it."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    wide = {output for node in graph.node if node.op_type == "Cast" and _to_float(node) for output in node.output}
    return [node.name for node in graph.node if wide.intersection(node.input)]


def _to_float(node: Any) -> bool:
    return any(attribute.name == "to" and attribute.i == 1 for attribute in node.attribute)
