"""The table of docs/deploy.md, in one call: models on this CPU, in each form in which they can be served.

    python benchmarks/deploy.py --docs docs

Files are written first, each for all sizes and batches, and checked against its model. Then all forms of a model are
timed in the same rounds, on the same threads, beside softmax on the same host: timm's model, and the file of our host
with softmax in it. What takes longer to begin than `--limit` is given up. About seven minutes on two CPU cores; files
of torch.export and AOTInductor are measured where `--ways` has them.
"""

import argparse
import functools
import importlib.util
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _script import exit_status
from torch import nn

import linsight
import linsight.bench as room
from linsight.bench import Cell, Send, Setting, Side, Step, Subject, Worker, alternate
from linsight.bench.rows import digits
from linsight.errors import LinsightError, UnknownNameError
from linsight.export import Facts, export_aoti, export_onnx, export_program, open_exported
from linsight.fuse import fuse
from linsight.models import VARIANTS
from linsight.runtime.files import write_text

BLOCK = re.compile(r"(<!-- generated: deploy -->\n).*?(?=<!-- end -->)", re.DOTALL)
BUILT = (224, 224)  # height and width that files are made at
MODELS = ("inline_deit_tiny", "inline_swin_tiny")
SIZES = ((224, 1), (672, 1))  # pixels of a side, images
PACKAGES = ("onnxruntime", "openvino")  # whose versions are told
Size = tuple[int, int]
Run = Callable[[torch.Tensor], Any]


class Form(NamedTuple):
    """A model as it is served.

    way: of `WAYS`.  file: where that has one.  error: why there is none.
    """

    name: str
    way: str
    file: str = ""
    error: str = ""


class Way(NamedTuple):
    """title: for people.  load: gives what takes images.  file: the way whose file it runs; "" for none."""

    title: str
    load: Callable[[Form, Size], Run]
    file: str = ""


def build(form: Form, size: Size) -> nn.Module:
    """Fresh weights, the same each time."""
    torch.manual_seed(0)
    return room.build(Subject("model", form.name), size, "cpu").eval()


def fused(form: Form, size: Size) -> nn.Module:
    return fuse(build(form, size), inplace=True)


@functools.cache
def compiled(form: Form) -> Run:
    """One graph for all sizes and batches, as the files have."""
    return torch.compile(fused(form, BUILT), dynamic=True)


def openvino(form: Form) -> Run:
    """Of the ONNX file, on as many threads as torch uses."""
    import openvino

    setting = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(form.file, "CPU", setting)
    return lambda images: model(images.numpy())


WAYS = {
    "eager": Way("PyTorch", build),
    "fused": Way("`linsight.fuse`", fused),
    "compiled": Way("`fuse`, then `torch.compile`", lambda form, size: compiled(form)),
    "program": Way(
        "torch.export", lambda form, size: torch.export.load(form.file).module(check_guards=False), "program"
    ),
    "aoti": Way("AOTInductor", lambda form, size: torch._inductor.aoti_load_package(form.file), "aoti"),
    "onnx": Way("ONNX Runtime", lambda form, size: open_exported(form.file).model, "onnx"),
    "openvino": Way("OpenVINO", lambda form, size: openvino(form), "onnx"),
}
EXPORTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "onnx": ("onnx", export_onnx),
    "program": ("pt2", export_program),
    "aoti": ("aoti.pt2", export_aoti),
}
USUAL = tuple(way for way in WAYS if way not in ("program", "aoti"))  # the others take minutes more
OF_SOFTMAX = ("eager", "onnx")  # the ways of the models beside ours
BASE = "fused"  # beside which ratios are


def measure(cell: Cell, forms: Mapping[int, Form], send: Send) -> None:
    """Time the forms of a cell, in the process of a `Worker`."""
    torch.set_num_threads(cell.setting.threads)
    size = (cell.height, cell.width)
    images = torch.randn(cell.batch, 3, *size)

    def make(form: Form) -> tuple[dict[str, Any], Step]:
        if form.error:
            raise LinsightError(form.error)
        run = WAYS[form.way].load(form, size)

        def step() -> None:
            with torch.inference_mode():
                run(images)

        return {}, step

    alternate(forms, make, send, torch.device("cpu"), cell.setting.seconds)


@functools.cache
def exported(folder: Path, name: str, kind: str) -> Form:
    """The file of a model, for all sizes, or why there is none."""
    suffix, export = EXPORTS[kind]
    torch.manual_seed(0)
    model, path = linsight.create_model(name).eval(), folder / f"{name}.{suffix}"
    try:
        done = export(model, path, facts=Facts(name, input_size=(3, *BUILT)))
    except LinsightError as error:
        print(f"{name}, {kind}: {error}", flush=True)
        return Form(name, kind, error=str(error))
    print(f"{name}, {done.form}: off by {done.error:.1e} of its largest number at most", flush=True)
    return Form(name, kind, str(path))


def forms(folder: Path, name: str, ways: list[str]) -> list[Form]:
    """All that is timed together: our model in each way, and softmax on its host in some."""
    softmax = room.softmax_beside(Subject("model", name))
    wanted = [(name, way) for way in ways]
    wanted += [(softmax.name, way) for way in ways if way in OF_SOFTMAX] if softmax else []
    found = []
    for of, way in wanted:
        kind = WAYS[way].file
        found.append(exported(folder, of, kind)._replace(way=way) if kind else Form(of, way))
    return sorted(found, key=lambda form: form.way != "compiled")  # what may be given up begins, and costs nothing else


def run(options: argparse.Namespace) -> str:
    """Measure, tell of it as it comes, and return the generated part of the page."""
    setting = Setting("cpu", "off", options.threads, options.seconds)
    torch.set_num_threads(options.threads)
    tables = []
    with tempfile.TemporaryDirectory() as folder, Worker(measure, options.limit) as worker:
        for name in options.models:
            found: dict[tuple[int, int], dict[Form, Side]] = {}
            lost: dict[tuple[str, str], str] = {}  # not tried at the next size
            for pixels, batch in options.sizes:
                sides = forms(Path(folder), name, options.ways)
                sides = [form._replace(error=lost.get((form.name, form.way), form.error)) for form in sides]
                cell = Cell("infer", pixels, pixels, batch, setting)
                found[pixels, batch] = dict(zip(sides, worker.run(cell, sides), strict=True))
                tell(found[pixels, batch], pixels, batch)
                lost |= {(form.name, form.way): side.error for form, side in found[pixels, batch].items() if side.error}
            tables.append(f"### {name}\n\n{table(name, found)}")
    told = {key: value for key, value in room.run_facts(setting).items() if value not in (None, False)}
    told |= {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    command = shlex.join(["python", "benchmarks/deploy.py", *options.arguments])
    facts = ", ".join(f"{key} {value}" for key, value in told.items())
    return "\n\n".join([f"```bash\n{command}\n```", facts, *tables]) + "\n"


def tell(sides: Mapping[Form, Side], pixels: int, batch: int) -> None:
    for form, side in sides.items():
        times = room.spread([1000 * seconds for seconds in side.times]) if side.times else side.error
        print(f"{form.name}, {form.way}, {batch} of {pixels}: {times}", flush=True)


def table(name: str, found: Mapping[tuple[int, int], Mapping[Form, Side]]) -> str:
    """A line for each form, a column for each size: milliseconds, and the ratio to the fused model's time."""
    head = [f"ms (ratio to `{BASE}`)", *(f"{batch} x {pixels}" for pixels, batch in found)]
    lines: dict[tuple[str, str], list[str]] = {}
    for sides in found.values():
        base = next((side for form, side in sides.items() if (form.name, form.way) == (name, BASE)), Side())
        for form, side in sides.items():
            lines.setdefault((form.name, form.way), []).append(cell_text(side, base))
    body = [
        [WAYS[way].title if of == name else f"softmax (`{of}`), {WAYS[way].title}", *cells]
        for (of, way), cells in sorted(
            lines.items(), key=lambda line: (line[0][0] != name, list(WAYS).index(line[0][1]))
        )
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def cell_text(side: Side, base: Side) -> str:
    if not side.times:
        return side.error
    ratio = statistics.median(room.ratios(side, base)) if base.times else None
    shown = digits(1000 * statistics.median(side.times))
    return shown if ratio is None else f"{shown} ({ratio:.2f})"


def sizes(text: str) -> list[tuple[int, int]]:
    """`224:1,672:1` as pixels of a side and images."""
    try:
        found = [tuple(map(int, each.split(":"))) for each in text.split(",")]
        return [(pixels, batch) for pixels, batch in found]
    except ValueError:
        raise LinsightError(f"--sizes {text}: give PIXELS:BATCH, several with a comma, as 224:1,672:1") from None


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", default=",".join(MODELS), help="which of linsight's, by commas")
    add("--ways", default=",".join(USUAL), help=f"which forms of them: {', '.join(WAYS)}")
    add("--sizes", default=",".join(f"{pixels}:{batch}" for pixels, batch in SIZES), help="pixels of a side: images")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--seconds", type=float, default=10.0, help="to spend on the rounds of a size; there are three at least")
    add("--limit", type=float, default=120.0, help="seconds for the first steps of something, or a later one")
    add("--docs", type=Path, help="the folder of deploy.md, to write the result into")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    options.models, options.ways = options.models.split(","), options.ways.split(",")
    options.sizes = sizes(options.sizes)
    for name in options.models:
        if name not in VARIANTS:
            raise UnknownNameError("model", name, VARIANTS)
    for way in options.ways:
        if way not in WAYS:
            raise UnknownNameError("way", way, WAYS)
    if not importlib.util.find_spec("openvino"):
        options.ways = [way for way in options.ways if way != "openvino"]
    if options.docs and not (
        (path := options.docs / "deploy.md").exists() and BLOCK.search(path.read_text(encoding="utf-8"))
    ):
        raise LinsightError(f"'{path}' is not there, or has no line '<!-- generated: deploy -->' to write below")
    return options


def document(folder: Path, text: str) -> None:
    """Put the result into deploy.md of `folder`."""
    path = folder / "deploy.md"
    write_text(path, BLOCK.sub(lambda found: f"{found[1]}{text}\n", path.read_text(encoding="utf-8")))


def main(arguments: list[str] | None = None) -> int:
    def work() -> None:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        text = run(options)
        print(text)
        if options.docs:
            document(options.docs, text)

    return exit_status(__file__, work)


if __name__ == "__main__":
    sys.exit(main())
