"""The commands train, eval, predict and merge."""

import inspect
import pathlib
from typing import Annotated, Any

import typer

from linsight.recipe import GROUPS, Recipe
from linsight.records import Record
from linsight.runtime.console import new_console
from linsight.runtime.files import to_json
from linsight.runtime.launch import require_rank, this_copy
from linsight.tasks import field_of, known_fields
from linsight.train.progress import Silent, reporter
from linsight.train.recipes import OWN

from . import batch
from .asked import Amp, Bad, Device, Fill, From, Json, Size, check, print_facts, tell, tell_bad
from .predict import predict
from .recipe import recipe
from .show import Command, make_table, terminal
from .source import Source, load

_METAVARS = {"integer": "INT", "number": "NUMBER", "string": "TEXT", "array": "N,N", "object": "NAME=VALUE,..."}
_ABOUT = "\n\n".join(
    [
        *(f"{name}: {shipped.about}" for name, shipped in OWN.items()),
        "Every published model of 'linsight list' has the recipe of its paper, for ImageNet-1K, by its own name; "
        "'linsight info MODEL' says what to expect.",
    ]
)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(
        "train",
        cls=Command,
        help=(
            "Train a model by a recipe; without arguments, a small one on handwritten digits.\n\n"
            "Each field of the recipe can be set. Ctrl-C saves the state; --resume FOLDER goes on.\n\n"
            f"Recipes:\n\n{_ABOUT}"
        ),
    )(_train)
    app.command(cls=Command)(recipe)
    app.command("eval", cls=Command)(evaluate)
    app.command("predict", cls=Command)(predict)
    app.command("merge", cls=Command)(batch.merge)


def _train(**options: Any) -> None:
    name, out, folder = options.pop("recipe"), options.pop("out"), options.pop("resume")
    auto = folder == "auto"
    if auto and out is None:
        raise typer.BadParameter("--resume auto needs --out: the folder of the run, there or not yet")
    for option, value in (("--recipe", name), ("--out", out)):
        if folder is not None and not auto and value is not None:
            raise typer.BadParameter(f"{option} cannot go with --resume: the run has its own")
    overrides = {key: field_of(key).parse(key, value) for key, value in options.items() if value is not None}
    run(name, overrides, out=out, folder=folder)


def run(
    name: str | None, overrides: dict[str, Any], *, out: str | None, folder: str | None = None, title: str | None = None
) -> None:
    """Train, or go on with the run in `folder`, and tell how it ended.

    name: of the recipe.  overrides: fields of it, or of the run.  folder: "auto" is `out`, where a run is there.
    title: of the run; none: that of the recipe.
    """
    auto = folder == "auto"
    report = Silent() if this_copy().rank else reporter(new_console())
    try:
        from linsight.train import resolve, resume, suggest, train
        from linsight.train.chosen import told_channels
        from linsight.train.idle import told_idle
        from linsight.train.loop import columns_of

        if folder is not None and not auto:
            summary = resume(folder, overrides=overrides, report=report)
        else:
            require_rank()
            if name is None:
                name = suggest(overrides)
                report.note(f"recipe {name}: {OWN[name].about.partition('. ')[0]}")
            recipe = resolve(name, overrides)
            if told := told_channels(name, recipe):
                report.note(told)
            for line in told_idle(recipe, name, overrides):
                report.note(line)
            title = title or pathlib.Path(name).stem
            summary = train(recipe, out=out, name=title, report=report, go_on=auto)
    finally:
        report.end()
    if this_copy().rank:
        return  # one of several processes tells
    best, *others = columns_of(summary)
    last = best.text({best.key: summary[f"last_{best.key}"]}, unit=True)
    when = f"epoch {summary['best_epoch']} of {summary['epochs']}; after the last {last}"
    print_facts(
        [
            [best.label, f"{best.text(summary, unit=True)} ({when})"],
            *([column.label, column.text(summary, unit=True)] for column in others),
            ["time", f"{summary['seconds']:.1f} s"],
            ["folder", summary["folder"]],
        ]
    )


def _signature() -> inspect.Signature:
    """One option for each field of `Recipe`, beside those of the run itself."""
    own: list[tuple[str, Any, Any]] = [
        (
            "recipe",
            str | None,
            typer.Option(
                metavar="NAME|FILE",
                help=f"{', '.join(OWN)}, a published model, or a .yaml, .toml or .json file",
                rich_help_panel="Run",
            ),
        ),
        (
            "out",
            str | None,
            typer.Option(help="the run folder, new or empty; none: runs/RECIPE-DATE-TIME", rich_help_panel="Run"),
        ),
        (
            "resume",
            str | None,
            typer.Option(
                metavar="FOLDER|auto",
                help="go on with the stopped run in a folder; auto: in --out, where there is one",
                rich_help_panel="Run",
            ),
        ),
    ]
    fields = known_fields()
    for name in sorted(fields, key=lambda name: GROUPS.index(fields[name].groups()[name])):
        own.append((name, *_option(name, fields[name])))
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint, option])
            for name, hint, option in own
        ]
    )


def _option(name: str, kind: type[Record]) -> tuple[Any, Any]:
    shown: dict[str, Any] = {"help": kind.help(name), "rich_help_panel": kind.groups()[name] or "Run"}
    type_ = kind.type_of(name)
    if type_ == "boolean":
        return bool | None, typer.Option(**shown)
    metavar = "|".join(map(str, kind.choices(name))) or _METAVARS[type_]
    return str | None, typer.Option(metavar=metavar, **shown)


_train.__signature__ = _signature()  # type: ignore[attr-defined]
_train.__annotations__ = {name: p.annotation for name, p in _train.__signature__.parameters.items()}  # type: ignore[attr-defined]


def evaluate(
    source: Source,
    checkpoint: Annotated[str | None, typer.Option(help="published weights, for a model given by name")] = None,
    from_size: From = None,
    data: Annotated[str | None, typer.Option(help="what to evaluate on; none: the run's own data")] = None,
    data_dir: Annotated[str | None, typer.Option(help=Recipe.help("data_dir"))] = None,
    split: Annotated[str | None, typer.Option(help="the split; none: validation, else test, else all")] = None,
    img_size: Size = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="images at a time; none: 128, 4 with masks or objects")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help=Recipe.help("workers"))] = None,
    device: Device = "auto",
    amp: Amp = "auto",
    on_bad_image: Bad = "skip",
    fill: Fill = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="GMACS|all", help="of a model with exits: mean operations of an image; all: the curve"),
    ] = None,
    out: Annotated[str | None, typer.Option(help="where --budget writes exits.*; none: the run folder")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a trained model: top-1 and top-5 in percent, loss, images a second. Or, with --budget, its exits."""
    from linsight.runtime.processes import joined
    from linsight.train import evaluate as run

    images: dict[str, Any] = {
        "img_size": img_size,
        "data": data,
        "data_dir": data_dir,
        "split": split,
        "workers": workers,
        "device": device,
        "amp": amp,
        "on_bad_image": on_bad_image,
        "fill": fill,
    }
    images |= {} if batch_size is None else {"batch_size": batch_size}
    check(images)
    if budget is not None:
        exits = load(source, checkpoint, from_size, option="--budget")
        _evaluate_exits(exits, budget, out, as_json, images)
        return
    if out is not None:
        raise typer.BadParameter("--out goes with --budget")
    trained = load(source, checkpoint, from_size, images)
    with joined(device) as processes:
        result = run(trained, **images, processes=processes)
    if not processes.main:
        return
    if as_json:
        typer.echo(to_json(result))
        return
    skipped = f", {result['skipped']} skipped" if result["skipped"] else ""
    print_facts(
        [
            *([column.label, column.text(result, unit=True)] for column in trained.task.columns),
            ["loss", f"{result['loss']:.4f}"],
            ["images", f"{result['images']} of {result['data']}{skipped}"],
            ["speed", f"{result['images_per_second']:.0f} images/s ({result['device']}, {result['precision']})"],
        ]
    )
    tell(result["notes"])
    tell_bad(result["bad"])


def _evaluate_exits(trained: Any, budget: str, out: str | None, as_json: bool, images: dict[str, Any]) -> None:
    from linsight.train import evaluate_exits

    try:
        limit = None if budget == "all" else float(budget)
    except ValueError:
        raise typer.BadParameter(f"--budget {budget} is no number of G multiply-adds, and not 'all'") from None
    result = evaluate_exits(trained, limit, out=out, **images)
    if as_json:
        typer.echo(to_json(result))
        return
    shown = [*result["exits"], *(result["settings"] if limit is None else [result["chosen"]])]
    columns = ["setting", *(f"T{k}" for k in (1, 2, 3)), *(f"% at exit {k}" for k in (1, 2, 3, 4)), "GMACs", "top-1 %"]
    rows = [
        [
            row["setting"],
            *("-" if least is None else f"{least:.3f}" for least in row["thresholds"]),
            *(f"{100 * share:.1f}" for share in row["shares"]),
            f"{row['gmacs']:.4g}",
            f"{row['top1']:.2f}",
        ]
        for row in shown
    ]
    terminal().print(make_table("", columns, rows))
    counts = result["images"]
    print_facts(
        [
            ["images", f"{counts['report']} reported on; {counts['calibration']} others set the thresholds"],
            ["files", ", ".join(result["files"])],
        ]
    )
    tell_bad(result["bad"])
