"""torch.export and AOTInductor files, loaded anew before they are kept."""

import io
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linsight.errors import LinsightError
from linsight.runtime.files import require_place
from linsight.runtime.places import located

from .facts import KEY, Facts
from .files import open_exported
from .placing import placing
from .runs import quiet
from .trace import Traced, traced
from .verify import Exported

COMPILERS = ("c++", "g++", "clang++", "cl")


def export_program(
    model: nn.Module,
    path: str | Path,
    *,
    facts: Facts | None = None,
    tolerance: float | None = None,
    half: bool = False,
) -> Exported:
    """Write `model` as a torch.export package (`.pt2`), and compare the file with the model; see `export_onnx`."""
    path = _package(path)
    with traced(model, facts, tolerance, half, "export") as of, quiet():
        program = _program(of)
        with placing(path) as temporary:
            with of.telling():  # the program holds the tensors of the model
                _save(program, of.facts, temporary)
                checks = of.check(open_exported(temporary).model, "the package")
            _save(program, of.told(checks), temporary)
            of.check(open_exported(temporary).model, "the package", first=True)
    return Exported(path, "torch.export", checks, of.limit, facts=of.told(checks))


def export_aoti(
    model: nn.Module,
    path: str | Path,
    *,
    facts: Facts | None = None,
    tolerance: float | None = None,
    half: bool = False,
) -> Exported:
    """Compile `model` for this kind of processor (`.pt2`, AOTInductor), and compare the file with the model.

    It is loaded by `torch._inductor.aoti_load_package`, in Python or C++; its facts are its metadata, "linsight".

    Raises:
        LinsightError: there is no C++ compiler, or see `export_onnx`.
    """
    path = _package(path)
    if not any(map(shutil.which, COMPILERS)):
        raise LinsightError("AOTInductor needs a C++ compiler, and none is installed: export to ONNX or torch.export")
    inductor: Any = torch._inductor
    compiled = io.BytesIO()
    with traced(model, facts, tolerance, half, "export") as of, quiet():
        program = _program(of)
        config = {"aot_inductor.metadata": {KEY: of.facts.dumps()}}
        of.attempt(
            "compiled",
            lambda: inductor.aoti_compile_and_package(program, package_path=compiled, inductor_configs=config),
        )
        with placing(path) as temporary:
            temporary.write_bytes(compiled.getvalue())
            run = of.attempt("compiled", lambda: inductor.aoti_load_package(str(temporary)))
            checks = of.check(run, "the compiled file")
    return Exported(path, "AOTInductor", checks, of.limit, facts=of.facts)


def _package(path: str | Path) -> Path:
    path = located(path)
    if path.suffix != ".pt2":
        raise LinsightError(f"'{path}': the name of a package must end with .pt2, by which torch knows it")
    require_place(path)
    return path


def _program(of: Traced) -> torch.export.ExportedProgram:
    shapes = (dict.fromkeys(of.dims, torch.export.Dim.DYNAMIC),) if of.dims else None
    program = of.attempt("exported", lambda: torch.export.export(of.model, (of.example,), dynamic_shapes=shapes))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of code, and where they are on this machine
    return program


def _save(program: torch.export.ExportedProgram, facts: Facts, path: Path) -> None:
    content = io.BytesIO()  # where torch itself cannot write, it ends the process
    torch.export.save(program, content, extra_files={KEY: facts.dumps()})
    path.write_bytes(content.getbuffer())
