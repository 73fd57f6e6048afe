"""The command predict."""

from typing import Annotated, Any

import typer

from linsight.errors import UnknownNameError
from linsight.runtime.console import new_console
from linsight.runtime.files import require_folder, to_json
from linsight.runtime.places import located
from linsight.train.progress import tile_reporter

from . import batch
from .asked import Amp, Bad, Device, Fill, From, Json, Size, check, print_facts, tell, tell_bad
from .show import make_table, terminal
from .source import Source, load

_OUTPUTS = ("classes", "features", "map")
_STREAM: dict[str, Any] = {"rich_help_panel": "Streaming"}


def predict(
    source: Source,
    images: Annotated[
        list[str], typer.Argument(help="image files, folders; with --out .tar, .zip, .parquet, hfds/NAME")
    ],
    checkpoint: Annotated[str | None, typer.Option(help="published weights, for a model given by name")] = None,
    from_size: From = None,
    top: Annotated[int, typer.Option(min=1, help="how many classes to show")] = 5,
    img_size: Size = None,
    device: Device = "auto",
    amp: Amp = "auto",
    on_bad_image: Bad = "skip",
    fill: Fill = None,
    as_json: Json = False,
    streamed: Annotated[
        bool, typer.Option("--stream", help="at full resolution, tile by tile: files of any size", **_STREAM)
    ] = False,
    tile: Annotated[int | None, typer.Option(min=1, help="side of a tile in pixels; none: 1024", **_STREAM)] = None,
    scratch: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="where maps lie; none: in memory", **_STREAM)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16", help="of the maps; none: float32", **_STREAM)
    ] = None,
    level: Annotated[
        int | None, typer.Option(min=0, help="of the pyramid of a slide or a TIFF; none: 0, the full size", **_STREAM)
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="or the level near so many microns a pixel", **_STREAM)] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="classes|features|map", help="what to give; none: classes", **_STREAM),
    ] = None,
    out: batch.Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the stopped run in --scratch", **_STREAM)
    ] = False,
    logits: batch.Logits = False,
    features: batch.Features = False,
    shard: batch.Shard = None,
    batch_size: batch.BatchSize = None,
    workers: batch.Workers = None,
    image_key: batch.ImageKey = None,
) -> None:
    """Say what a trained model sees in images: here, or with --out FILE.csv, of any number of them, in a file."""
    from linsight.train import predict as run

    settings: dict[str, Any] = {"device": device, "amp": amp, "on_bad_image": on_bad_image, "img_size": img_size}
    check(settings)
    given: dict[str, Any] = {"tile": tile, "scratch": scratch, "dtype": dtype, "resume": resume or None}
    given |= {"level": level, "mpp": mpp}
    given = {name: value for name, value in given.items() if value is not None}
    many = {"logits": logits, "features": features, "shard": shard, "batch_size": batch_size, "workers": workers}
    many = batch.check(many | {"image_key": image_key}, out, streamed)
    if streamed:
        if img_size is not None:
            raise typer.BadParameter("--img-size does not go with --stream, which takes images as they are")
        given |= {"device": device, "amp": amp, "fill": fill}
        trained = load(source, checkpoint, from_size, option="--stream")
        _predict_stream(trained, images, given, output, out, top, on_bad_image, as_json)
        return
    for name in [*given, *(["output"] if output is not None else [])]:
        raise typer.BadParameter(f"--{name} goes with --stream")
    if out is not None:
        trained = load(source, checkpoint, from_size, settings)
        if trained.task.writes:
            for name in many:
                raise typer.BadParameter(
                    f"--{name.replace('_', '-')} is for a file of classes: this task writes {trained.task.writes}"
                )
            _see(run, trained, images, out, as_json, top=top, fill=fill, **settings)
            return
        batch.run(trained, images, out, as_json, top=top, fill=fill, **settings, **many)
        return
    trained = load(source, checkpoint, from_size, settings)
    _see(run, trained, images, None, as_json, top=top, fill=fill, **settings)


def _predict_stream(
    trained: Any,
    images: list[str],
    given: dict[str, Any],
    output: str | None,
    out: str | None,
    top: int,
    on_bad_image: str,
    as_json: bool,
) -> None:
    from linsight.train import Tiling, predict_stream, save_stream

    if trained.task.writes:
        if output is not None:
            raise typer.BadParameter(
                f"--output {output} is not for this task: --out FOLDER writes {trained.task.writes}"
            )
        tiling = Tiling(**given, progress=tile_reporter(new_console(stderr=True)))
        _see(predict_stream, trained, images, out, as_json, tiling=tiling, top=top, on_bad_image=on_bad_image)
        return
    output = output or "classes"
    if output not in _OUTPUTS:
        raise UnknownNameError("output", output, _OUTPUTS)
    if (output == "classes") != (out is None):
        raise typer.BadParameter("--out FILE.npy goes with --output features and --output map, and they with it")
    if given.get("resume") and "scratch" not in given:
        raise typer.BadParameter("--resume needs --scratch, the folder of the stopped run")
    if out is not None and len(images) > 1:
        raise typer.BadParameter(f"--out is for one image, and {len(images)} are given: give one at a time")
    tiling, notes = Tiling(**given, progress=tile_reporter(new_console(stderr=True))), list[str]()
    if out is None:
        done = predict_stream(trained, images, tiling, top=top, on_bad_image=on_bad_image, note=notes.append)
        tell(notes)
        _tell_found(trained, *done, as_json)
        return
    shape = save_stream(trained, images[0], out, tiling, output=output, note=notes.append)  # type: ignore[arg-type]
    tell(notes)
    if as_json:
        typer.echo(to_json({"file": images[0], "output": output, "out": out, "shape": shape}))
    else:
        print_facts([[output, f"{' x '.join(map(str, shape))}, float32"], ["file", out]])


def _see(run: Any, trained: Any, images: list[str], out: str | None, as_json: bool, **settings: Any) -> None:
    """Predict, tell what is found, and write it into the folder `out`, of a task that writes."""
    notes = list[str]()
    folder = None if out is None else located(out)
    if folder is not None:
        require_folder(folder)
    done, bad = run(trained, images, **settings, note=notes.append)
    tell(notes)
    files = [] if folder is None else trained.task.write(done, folder)
    _tell_found(trained, done, bad, as_json)
    if files:
        typer.echo(f"linsight: {len(files)} files of {trained.task.writes} in '{out}'", err=True)


def _tell_found(trained: Any, done: list[Any], bad: list[str], as_json: bool) -> None:
    if as_json:
        typer.echo(to_json({"predictions": [trained.task.told(entry) for entry in done], "bad": bad}))
        return
    terminal().print(make_table("", *trained.task.table(done)))
    tell_bad(bad)
