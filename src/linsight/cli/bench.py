"""`linsight bench | advise`: what mechanisms and models cost here, and which one to pick for a size."""

import contextlib
import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linsight.errors import LinsightError, UnknownNameError
from linsight.runtime.files import to_json
from linsight.runtime.signals import Interrupted, exit_code

from .show import Command, Json, make_table, print_json, terminal

if TYPE_CHECKING:
    from linsight.bench import Advice, Choice, Done

_AMP = ("off", "auto", "bf16", "fp16")
_GRIDS, _IMAGES = "14,28,56", "224"


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command(cls=Command)(bench)
    app.command(cls=Command)(advise)


def _option(help: str, panel: str = "What", metavar: str | None = None, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, **more)


def bench(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAMES", help="mechanisms (A,B: operators), or models of ours or timm's; also 'inline_*'"
        ),
    ],
    attention: Annotated[
        str | None, _option("mechanisms to put into each model; + joins a plan of stages", metavar="A,B")
    ] = None,
    beside: Annotated[
        str | None,
        _option("what to compare with; 'none': nothing; default: softmax, in timm's model of the same host"),
    ] = None,
    sizes: Annotated[
        str | None,
        _option(
            f"sides of images in pixels, of operators in tokens; ':BATCH' has its own; default: {_IMAGES}, or {_GRIDS}",
            metavar="SIDE|HxW[:BATCH],...",
        ),
    ] = None,
    batch: Annotated[int, _option("images at a time, where a size has no other", min=1)] = 1,
    steps: Annotated[
        str, _option("forward, or forward and backward (of a model: with AdamW), or both", metavar="infer,train")
    ] = "infer,train",
    dim: Annotated[int, _option("width of operators, all heads together", min=1)] = 192,
    heads: Annotated[int, _option("heads of operators", min=1)] = 6,
    device: Annotated[str, _option("auto, cpu, cuda, cuda:1, mps ...", "How")] = "auto",
    amp: Annotated[str, _option("mixed precision; operators get tokens in it", "How", "|".join(_AMP))] = "off",
    threads: Annotated[int | None, _option("of the CPU; default: PyTorch's", "How", min=1)] = None,
    compiled: Annotated[bool, _option("compile by torch.compile", "How", None, "--compile")] = False,
    graphs: Annotated[bool, _option("replay CUDA graphs: no overhead of Python", "How", None, "--cuda-graphs")] = False,
    fused: Annotated[bool, _option("models as linsight.fuse makes them", "How", None, "--fused")] = False,
    seconds: Annotated[
        float, _option("to spend on the rounds of a size; there are three at least", "How", min=0)
    ] = 10.0,
    limit: Annotated[
        float, _option("seconds for the first steps of something, or a later one: else it is given up", "How", min=1)
    ] = 100.0,
    out: Annotated[Path | None, _option("folder for bench.csv, bench.html and bench.svg", "Results", "FOLDER")] = None,
    csv: Annotated[
        Path | None, _option("file for all numbers, with timm's names of columns", "Results", "FILE")
    ] = None,
    html: Annotated[Path | None, _option("file for one page with table and plot", "Results", "FILE")] = None,
    plot: Annotated[Path | None, _option("file for the plot: .svg, .png, .pdf", "Results", "FILE")] = None,
    as_json: Json = False,
) -> None:
    """Time mechanisms, or whole models, beside softmax: forward and training, memory, share of the machine's peak.

    All that is compared runs in one process, in rounds that take turns. Results are also kept for 'linsight advise'.

    linsight bench inline,focused,agent --dim 192 --heads 6 --sizes 14,28,56,112

    linsight bench inline_deit_tiny --sizes 224:4,1344:1

    linsight bench deit_tiny_patch16_224 --attention inline,agent
    """
    import torch

    from linsight import bench as room

    if amp not in _AMP:
        raise UnknownNameError("--amp", amp, _AMP)
    chosen = tuple(_parts(steps))
    for step in chosen:
        if step not in room.STEPS:
            raise UnknownNameError("step", step, room.STEPS)
    groups = room.plan_groups(_parts(",".join(names)), _parts(attention or ""), beside or "")
    operators = groups[0].sides[0].kind == "operator"
    threads = threads or torch.get_num_threads()
    setting = room.Setting(device, amp, threads, seconds, dim, heads, compiled, graphs, fused)
    plan = room.Plan(groups, _sizes(sizes or (_GRIDS if operators else _IMAGES), batch), setting, chosen, limit)
    plan = room.check_plan(plan)
    files = _Files.open(out, csv, html, plot)
    code, done = 0, None
    try:
        for done in room.bench(plan):
            _tell(done)
            files.keep(done)
    except KeyboardInterrupt as stopped:
        code = exit_code(stopped)
    if done:
        _finish(done, files, as_json)
    if code:
        raise Interrupted("stopped; what was measured is kept" if done else "stopped; nothing was measured", code)


@dataclasses.dataclass
class _Files:
    """Where results go, each file whole at any moment; `kept` is that of this machine's results."""

    csvs: list[Path]
    html: Path | None
    plot: Path | None
    kept: Path | None = None

    @classmethod
    def open(cls, out: Path | None, csv: Path | None, html: Path | None, plot: Path | None) -> "_Files":
        """Refuse, before anything is measured, what cannot be written."""
        from linsight.bench import results_folder, write_rows
        from linsight.runtime.figures import require_picture

        files = cls([csv] if csv else [], html, plot)
        with _refusing():
            if out:
                out.mkdir(parents=True, exist_ok=True)
                files.csvs.append(out / "bench.csv")
                files.html, files.plot = html or out / "bench.html", plot or out / "bench.svg"
            if files.html:
                require_picture(files.html.with_suffix(".svg"))  # the page has the same picture
            if files.plot:
                require_picture(files.plot)
            for path in files.csvs:
                write_rows(path, [], {})
            results_folder().mkdir(parents=True, exist_ok=True)
        return files

    def keep(self, done: "Done") -> None:
        """Write all rows so far."""
        from linsight.bench import write_rows
        from linsight.bench.run import results_file

        self.kept = self.kept or results_file(done.facts)
        for path in (*self.csvs, self.kept):
            write_rows(path, done.rows, done.facts)

    def close(self, done: "Done") -> None:
        """Draw what there is to draw."""
        from linsight.bench import write_page, write_plot

        if self.plot:
            write_plot(self.plot, done.rows, f"{done.facts['device']}, {done.facts['precision']}")
        if self.html:
            write_page(self.html, done.rows, done.facts, shlex.join(["linsight", *sys.argv[1:]]))


def _finish(done: "Done", files: _Files, as_json: bool) -> None:
    from linsight.bench import table

    files.close(done)
    if as_json:
        print(to_json([{**row, **done.facts} for row in done.rows], indent=2))
        return
    head, body = table(done.rows)
    console = terminal()
    console.print(make_table("", head, body))
    facts = {key: value for key, value in done.facts.items() if value not in (None, False)}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), soft_wrap=True)
    for path in filter(None, (*files.csvs, files.html, files.plot, files.kept)):
        console.print(f"wrote {path}", soft_wrap=True)


def _tell(done: "Done") -> None:
    """A line on standard error for each side of a cell, at once: a run takes long."""
    from linsight.bench.rows import show_size, spread

    cell = done.cell
    for subject, side in done.sides.items():
        result = f"{spread([1000 * t for t in side.times])} ms" if side.times else side.error
        size = show_size(cell.height, cell.width)
        typer.echo(f"{subject.label}, {size}, batch {cell.batch}, {cell.step}: {result}", err=True)


def advise(
    size: Annotated[str, typer.Option(metavar="SIDE|HxW", help="of the images, in pixels")],
    patch: Annotated[int, typer.Option(min=1, help="pixels of a token's side")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps: which results to go by")] = "auto",
    amp: Annotated[
        str | None, typer.Option(metavar="off|bf16|fp16", help="precision to go by; default: float32, if measured")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="for training; without it, for a forward")] = False,
    dim: Annotated[int, typer.Option(min=1, help="width of the operators, all heads together")] = 192,
    heads: Annotated[int, typer.Option(min=1, help="heads of the operators")] = 6,
    model: Annotated[
        str | None, typer.Option(help="choose among models measured beside this one, not among operators")
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option("--from", metavar="FILE", help="more results, as 'linsight bench' writes them")
    ] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="weigh time against accuracy: a short list, each with its reason")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="for --accuracy: cifar10 (the default), recall-4, -8, -16 or -64")
    ] = None,
    need: Annotated[
        str, typer.Option(help="for --accuracy: what a mechanism must do, with commas, as keep,stream,causal,onnx")
    ] = "",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="for --accuracy: a picture of both figures")] = None,
    as_json: Json = False,
) -> None:
    """Say which mechanism is the fastest for images of a size, by what 'linsight bench' measured here.

    It also says where softmax is faster, and when it has to guess. With --accuracy, it says which are worth their time.
    """
    from linsight.bench import Question, can_answer, known_results, shipped_results
    from linsight.bench import advise as answer

    precisions = {None: "", "off": "float32", "bf16": "bf16", "fp16": "fp16"}
    if amp not in precisions:
        raise UnknownNameError("--amp", str(amp), [name for name in precisions if name])
    if not accuracy and (need or (task, plot) != (None, None)):
        raise LinsightError("--task, --need and --plot are for --accuracy: add it")
    if model and accuracy:
        raise LinsightError("accuracies are of mechanisms in one small host, not of models: leave out --model")
    (height, width, _), *others = _sizes(size, 1)
    if others:
        raise LinsightError(f"the answer is for images of one size, and '{size}' are {len(others) + 1}: ask for each")
    question = Question(height, width, patch, _device(device), precisions[amp], train, dim, heads, model or "")
    rows = known_results(source or ())
    shipped = not source and not can_answer(rows, question)
    found = answer(shipped_results() if shipped else rows, question)
    if shipped and not as_json:
        typer.echo(f"Measured on another machine, {found.where['device']}: 'linsight bench' measures on this one.")
    if accuracy:
        _weigh(found, "cifar10" if task is None else task, _parts(need), plot, as_json)
        return
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for line in found.words:
        typer.echo(line)
    head = ["", "ms an image", "time ratio", "faster from tokens", "measured, tokens", ""]
    terminal().print(make_table("", head, [_choice(choice) for choice in found.choices]))


def _weigh(advice: "Advice", task: str, needs: list[str], plot: Path | None, as_json: bool) -> None:
    from linsight.bench import read_accuracies, shortlist, write_pareto
    from linsight.bench.rows import digits
    from linsight.runtime.figures import require_picture

    if plot is not None:
        require_picture(plot)
    found = shortlist(advice, read_accuracies(task), needs)
    if plot is not None:
        write_pareto(plot, found, f"{advice.tokens:,} tokens on {advice.where['device']}; accuracies of {task}")
    if as_json:
        print_json(dataclasses.asdict(found) | {"tokens": advice.tokens, "where": dict(advice.where)})
        return
    for line in found.words:
        typer.echo(line)
    body = [
        [pick.choice.name, f"{pick.top1:.1f}", digits(pick.choice.milliseconds), _choice(pick.choice)[2], pick.reason]
        for pick in found.picks
    ]
    terminal().print(make_table("", ["", "top-1 %", "ms an image", "time ratio", ""], body))


def _choice(choice: "Choice") -> list[str]:
    from linsight.bench.rows import digits

    paying = "-" if choice.from_tokens is None else f"{choice.from_tokens:,.0f}" if choice.from_tokens else "any"
    notes = [f"{choice.beyond:.2g} times beyond what was measured"] if choice.beyond > 1 else []
    return [
        choice.name,
        digits(choice.milliseconds),
        "-" if choice.ratio is None else f"{choice.ratio:.2f}",
        paying,
        "..".join(f"{tokens:,.0f}" for tokens in choice.measured),
        "; ".join([*notes, *filter(None, [choice.note])]),
    ]


def _device(name: str) -> str:
    import torch

    from linsight.runtime.device import pick_device

    if name == "auto":
        return pick_device(name).type
    try:
        return torch.device(name).type  # which need not be here
    except RuntimeError:
        raise LinsightError(f"unknown device '{name}': cpu, cuda, mps ...") from None


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _sizes(text: str, batch: int) -> tuple[tuple[int, int, int], ...]:
    found = []
    for part in _parts(text):
        match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?(?::([1-9]\d*))?", part)
        if not match:
            raise LinsightError(f"'{part}' is no size: write a side as 224, or HEIGHTxWIDTH, and :BATCH behind it")
        height, width, images = (int(group) if group else 0 for group in match.groups())
        found.append((height, width or height, images or batch))
    if not found:
        raise LinsightError("no size is given: write sides as 224,448")
    return tuple(found)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LinsightError(f"'{error.filename}' cannot be written: {error.strerror}") from None
