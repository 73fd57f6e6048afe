"""torch.export and AOTInductor files, loaded anew before they are kept."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from linsight.attention import check_way
from linsight.errors import LinsightError
from linsight.runtime.files import replacing

from .files import KEY, Facts
from .trace import Traced, traced
from .verify import TOLERANCE, Exported, compare

COMPILERS = ("c++", "g++", "clang++", "cl")


def export_program(
    model: nn.Module, path: str | Path, *, facts: Facts | None = None, tolerance: float = TOLERANCE
) -> Exported:
    """Write `model` as a torch.export package (`.pt2`), and compare the file with the model; see `export_onnx`."""
    check_way(model, "export")
    path = Path(path)
    with traced(model, facts) as of:
        program = _program(of)
        with replacing(path) as temporary:
            torch.export.save(program, str(temporary), extra_files={KEY: of.facts.dumps()})
            run = torch.export.load(str(temporary)).module()
            checks = compare(of.model, lambda x: tree_leaves(run(x)), of.inputs, tolerance, "the package")
    return Exported(path, "torch.export", checks)


def export_aoti(
    model: nn.Module, path: str | Path, *, facts: Facts | None = None, tolerance: float = TOLERANCE
) -> Exported:
    """Compile `model` for this kind of processor (`.pt2`, AOTInductor), and compare the file with the model.

    It is loaded by `torch._inductor.aoti_load_package`, in Python or C++.

    Raises:
        LinsightError: there is no C++ compiler, or see `export_onnx`.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise LinsightError("AOTInductor needs a C++ compiler, and none is installed: export to ONNX or torch.export")
    check_way(model, "export")
    path = Path(path)
    inductor: Any = torch._inductor
    with traced(model, facts) as of:
        program = _program(of)
        with replacing(path) as temporary:
            config = {"aot_inductor.metadata": {KEY: of.facts.dumps()}}
            of.attempt(
                "compiled",
                lambda: inductor.aoti_compile_and_package(
                    program, package_path=str(temporary), inductor_configs=config
                ),
            )
            run = inductor.aoti_load_package(str(temporary))
            checks = compare(of.model, lambda x: tree_leaves(run(x)), of.inputs, tolerance, "the compiled file")
    return Exported(path, "AOTInductor", checks)


def _program(of: Traced) -> torch.export.ExportedProgram:
    shapes = (dict.fromkeys(of.dims, torch.export.Dim.DYNAMIC),) if of.dims else None
    return of.attempt("exported", lambda: torch.export.export(of.model, (of.example,), dynamic_shapes=shapes))
