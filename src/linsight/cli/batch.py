"""`linsight predict --out FILE.csv` and `linsight merge`: any number of images into one file."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from linsight.errors import LinsightError
from linsight.recipe import Recipe
from linsight.runtime.console import new_console
from linsight.runtime.files import to_json
from linsight.runtime.launch import this_copy
from linsight.runtime.text import printable
from linsight.train.progress import Images, image_reporter

from .show import make_table, terminal

_MANY: dict[str, Any] = {"rich_help_panel": "Into a file"}
Out = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="where it is written: .csv, .jsonl or .parquet, a row an image; with --stream, .npy: features or the map; "
        "of masks, a folder",
        **_MANY,
    ),
]
Logits = Annotated[bool, typer.Option("--logits", help="what the model answers, too", **_MANY)]
Features = Annotated[bool, typer.Option("--features", help="the vector before the classifier, too", **_MANY)]
Shard = Annotated[
    str | None, typer.Option(metavar="I/N", help="only the I-th of N shares, on a machine of its own", **_MANY)
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="images at a time; none: 64", **_MANY)]
Workers = Annotated[int | None, typer.Option(min=0, help=Recipe.help("workers"), **_MANY)]
ImageKey = Annotated[str | None, typer.Option(help=Recipe.help("image_key"), **_MANY)]


def check(given: Mapping[str, Any], out: str | None, streamed: bool) -> dict[str, Any]:
    """The options for a file of many images that were given, read; refused where there is none."""
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    for name in given:
        if out is None or streamed:
            raise typer.BadParameter(f"--{name.replace('_', '-')} goes with --out FILE.csv, without --stream")
    if not streamed and out is None and (copies := this_copy().world) > 1:
        raise LinsightError(f"{copies} copies would say the same: they share the work with --out FILE.csv")
    if "shard" not in given:
        return dict(given)
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", given["shard"])
    if found is None:
        raise typer.BadParameter(f"--shard {given['shard']} is not of the form 1/4, the first of four")
    return {**given, "shard": tuple(map(int, found.groups()))}


def run(trained: Any, images: list[str], out: str, as_json: bool, **settings: Any) -> None:
    """Predict into `out`, and tell how far it is."""
    from linsight.train import predict_to

    copy = this_copy()
    report = image_reporter(new_console(stderr=True)) if copy.rank == 0 else Images()
    done = predict_to(trained, images, out, report=report, note=_tell, **settings)
    for line in done.unread[:10]:
        _tell(f"not read: {line}")
    if len(done.unread) > 10:
        _tell(f"not read: {len(done.unread) - 10} more")
    if done.left:
        others = "shards or processes" if copy.world > 1 else "shards"
        _tell(f"{done.parts - done.left} of {done.parts} parts are in '{out}.parts'; other {others} have the rest")
    if copy.world > 1 and done.errors is None:
        return  # the copy that wrote it tells
    if as_json:
        typer.echo(to_json(dataclasses.asdict(done)))
        return
    bad = f", {done.errors:,} of them with an error" if done.errors else ""
    rows = [["images", f"{done.images:,}{bad}"]]
    if done.predicted:
        rows.append(["speed", f"{done.predicted / max(done.seconds, 1e-9):,.1f} images/s"])
    if not done.left:
        rows.append(["file", out])
    terminal().print(make_table("", ["", ""], rows, header=False))


def merge(
    out: Annotated[str, typer.Argument(help="the file to write: .csv, .jsonl or .parquet")],
    parts: Annotated[
        list[str] | None, typer.Argument(metavar="[FOLDER]...", help="folders of parts; none: that beside the file")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Make one file of the parts that `linsight predict --shard` left on several machines."""
    from linsight.train import merge_predictions

    images, errors = merge_predictions(out, parts or [])
    if as_json:
        typer.echo(to_json({"out": out, "images": images, "errors": errors}))
        return
    bad = f", {errors:,} of them with an error" if errors else ""
    terminal().print(make_table("", ["", ""], [["images", f"{images:,}{bad}"], ["file", out]], header=False))


def _tell(line: str) -> None:
    typer.echo(f"linsight: {printable(line)}", err=True)
