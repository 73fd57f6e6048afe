"""`linsight export`: a model as a file that runs elsewhere, checked before it is called done."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.console import new_console

from .show import Command, Json, make_table, print_json, terminal

_SUFFIXES = {"onnx": ".onnx", "program": ".pt2", "compiled": ".pt2", "safetensors": ".safetensors"}
_SHOWN = 8  # names of nodes; --json has all


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(cls=Command)(export)


def _file(help: str) -> Any:
    return typer.Option(metavar="FILE", help=help, rich_help_panel="Files, one at least")


def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, its best.safetensors, or a model's name")],
    onnx: Annotated[Path | None, _file("ONNX, for ONNX Runtime, OpenVINO, TensorRT ...: FILE.onnx")] = None,
    program: Annotated[Path | None, _file("a package of torch.export: FILE.pt2")] = None,
    compiled: Annotated[
        Path | None, _file("machine code for this kind of processor, by AOTInductor: FILE.pt2; needs a C++ compiler")
    ] = None,
    safetensors: Annotated[Path | None, _file("weights alone, which linsight loads as a run: FILE.safetensors")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="published weights, for a model given by name")] = None,
    from_size: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="size of the images --checkpoint was made for, if it does not tell"),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="a model by name as it is initialised, untrained")] = False,
    img_size: Annotated[
        str | None, typer.Option(metavar="N,N", help="side of the images, or height and width; none: the model's own")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="for one image of that size; else for any, in batches")
    ] = False,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="resize and normalise in the graph: uint8 in, probabilities out")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="weights and images in float16; sums over tokens stay in float32")
    ] = False,
    opset: Annotated[int | None, typer.Option(min=1, help="of ONNX; none: 20")] = None,
    as_json: Json = False,
) -> None:
    """Export a trained model: ONNX, torch.export, machine code, or weights.

    Each file is run beside the model at three sizes and batches that the export did not see, and is kept only if both
    answer alike. Classes, sizes and how images are prepared travel in it: 'linsight predict FILE.onnx photo.jpg'.

    linsight export runs/NAME --onnx model.onnx
    """
    given = {"onnx": onnx, "program": program, "compiled": compiled, "safetensors": safetensors}
    files = {form: path for form, path in given.items() if path is not None}
    _check_files(files)
    if opset is not None and onnx is None:
        raise typer.BadParameter("--opset goes with --onnx")
    if random and checkpoint is not None:
        raise typer.BadParameter("--random has no weights, and --checkpoint does: give one of them")
    sides = Recipe.parse("img_size", img_size or "")
    trained = _source(source, checkpoint, from_size, random)
    for path in files.values():
        if path.exists() and trained.path.exists() and path.samefile(trained.path):
            raise LinsightError(f"'{path}' is what is exported: give another name")
    from linsight.export.trained import ExportPlan

    plan = ExportPlan(trained, sides, static=static, preprocess=preprocess, half=half, opset=opset)
    found = []
    for form, path in files.items():
        with _spinner(f"exporting {path} ..."):
            done = plan.export(form, path)
        found.append(plan.row(done))
        if not as_json:
            _tell(found[-1])
    if as_json:
        print_json(found)


def _check_files(files: dict[str, Path]) -> None:
    """Refuse, before anything is computed, what cannot be written."""
    from linsight.runtime.files import require_place

    if not files:
        raise typer.BadParameter(f"say what to export to: {', '.join(f'--{form} FILE' for form in _SUFFIXES)}")
    places = [path.absolute() for path in files.values()]
    for form, path in files.items():
        if path.suffix != _SUFFIXES[form]:
            raise typer.BadParameter(f"--{form} {path}: the name must end with {_SUFFIXES[form]}")
        if places.count(path.absolute()) > 1:
            raise typer.BadParameter(f"two files cannot both be '{path}'")
        require_place(path)


def _source(source: str, checkpoint: str | None, from_size: str | None, random: bool) -> Any:
    from linsight.export.trained import is_exported
    from linsight.train.model import load_named, load_source

    if is_exported(source):
        raise LinsightError(f"'{source}' is an exported file: export the run or the model that it was made of")
    if not random:
        return load_source(source, checkpoint, from_size, hint="; --random exports it untrained")
    if Path(source).exists() or from_size is not None:
        raise typer.BadParameter("--random goes with the name of a model, which has no weights of its own")
    return load_named(source, None)


@contextlib.contextmanager
def _spinner(text: str) -> Iterator[None]:
    console = new_console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


def _tell(row: dict[str, Any]) -> None:
    sizes = ", ".join("x".join(map(str, check["shape"])) for check in row["checks"])
    nodes = row["float32_nodes"]
    more = f", and {len(nodes) - _SHOWN} more (--json names them)" if len(nodes) > _SHOWN else ""
    facts = {
        row["form"]: f"{row['file']}, {row['bytes'] / 1e6:.1f} MB",
        "takes": row["takes"],
        "gives": ", ".join(row["outputs"]),
        "checked": f"largest error {row['error']:.1e} of {row['limit']:.1e} allowed, at {sizes}",
        "in float32": f"{len(nodes)} nodes: {', '.join(nodes[:_SHOWN])}{more}" if nodes else "",
    }
    terminal().print(make_table("", ["", ""], [[key, text] for key, text in facts.items() if text], header=False))
