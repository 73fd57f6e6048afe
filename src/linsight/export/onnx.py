"""ONNX files, by torch's exporter, run by onnxruntime before they are kept."""

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from linsight.errors import LinsightError, MissingExtraError
from linsight.runtime.files import require_place
from linsight.runtime.places import located

from .facts import KEY, Facts
from .files import open_exported
from .graph import onnx_program
from .placing import placing
from .runs import OnnxModel, quiet
from .trace import Traced, traced
from .verify import Exported

OPSET = 20
OLDEST = 18  # that torch writes
LARGE = 1_900_000_000  # bytes of weights that one file of protobuf has room for


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    facts: Facts | None = None,
    opset: int = OPSET,
    tolerance: float | None = None,
    half: bool = False,
) -> Exported:
    """Write `model` as an ONNX file, and compare what onnxruntime makes of it with the model.

    The graph has one input, `images`, and one output, `output`; that of a `Served` has `pixels` and `probabilities`.
    Several outputs are called as the model calls them, or `output_0` and so on. Batch, height and width are free,
    unless `facts` say otherwise, and the file is checked at three of each that the export did not see. Weights of more
    than 1.9 GB lie in a file of their own beside it, `NAME.onnx.data`.

    Args:
        model: of images `(B, C, H, W)`, or of pixels, as a `Served`.
        path: where the file will be; it stays as it was if the export fails.
        facts: what the file will say of itself; by default, what the model's `pretrained_cfg` says.
        opset: of ONNX.
        tolerance: the largest error that is accepted, as a share of the largest number that the model answers; by
            default 1e-4, and 1e-3 for pixels, which the graph rounds.
        half: weights and images are float16; sums over tokens stay in float32. Twice the model's own error in float16
            is accepted.

    Raises:
        LinsightError: the model cannot be exported so, the file answers otherwise than the model, or cannot be written.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    path = located(path)
    require_place(path)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "export", "exporting to ONNX")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise LinsightError(f"opset {opset} cannot be written: {OLDEST} to {newest} can")
    with traced(model, facts, tolerance, half, "onnx") as of, quiet():
        program = of.attempt("ONNX", lambda: _program(of, opset))
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # lines of code, and where they are on this machine
        large = sum(value.const_value.nbytes for value in program.model.graph.initializers.values()) > LARGE
        with placing(path) as temporary:
            with of.telling():  # the program holds the tensors of the model
                _save(program, of.facts, temporary, large)
                run = of.attempt("ONNX", lambda: OnnxModel(temporary))
                checks = of.check(run, "the ONNX file")
                del run  # some systems keep a file in its place while it is read
            _save(program, of.told(checks), temporary, large)
            of.check(open_exported(temporary).model, "the ONNX file", first=True)
            wide = nodes_in_float32(temporary) if half else ()
    return Exported(path, f"ONNX, opset {opset}", checks, of.limit, wide, of.told(checks))


def _program(of: Traced, opset: int) -> Any:
    program = onnx_program(
        of.model,
        (of.example,),
        dynamic_shapes=(of.dims,) if of.dims else None,
        opset_version=opset,
        input_names=list(of.facts.inputs),
        output_names=list(of.facts.outputs),
        verbose=False,
    )
    if program.model.opset_imports.get("") != opset:
        raise LinsightError(f"opset {opset} cannot be written of this model: take {OPSET}")
    return program


def _save(program: Any, facts: Facts, path: Path, large: bool) -> None:
    program.model.metadata_props[KEY] = facts.dumps()
    program.save(path, external_data=True if large else None)


def nodes_in_float32(path: str | Path) -> tuple[str, ...]:
    """Names of the nodes of a half-precision file that compute in float32: those that read or give such numbers."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    wide = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    return tuple(node.name for node in graph.node if node.op_type != "Cast" and wide.intersection(node.output))
