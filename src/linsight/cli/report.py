"""`linsight report`: the page of a run."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from linsight.recipe import Recipe

from .show import Command

if TYPE_CHECKING:
    from linsight.tasks import Shown

_TIMES, SECONDS = (1, 2, 4), 4.0  # the run's size; seconds of each


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(cls=Command)(report)


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run, which has ended or was stopped")],
    out: Annotated[str | None, typer.Option(metavar="FILE", help="none: report.html in the folder")] = None,
    device: Annotated[str, typer.Option(help=Recipe.help("device"))] = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help=Recipe.help("workers"))] = None,
    beside: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="another run to put beside it; as often as you like")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="time the model beside softmax, for images of 1, 2, 4 times its size")
    ] = False,
) -> None:
    """Write the page of a run anew: curves, confusion, worst mistakes, speed, recipe, machine, in one file of HTML.

    A run writes it at its end. The best weights look at the images that they were evaluated on once more.
    """
    from linsight.train import write_report

    more = [_speed(run, device)] if speed else []
    typer.echo(str(write_report(run, out=out, device=device, workers=workers, beside=beside or (), more=more)))


def _speed(run: str, device: str) -> "Shown":
    """Times and memory of a forward of one image, at three sizes."""
    import torch

    from linsight.bench import Setting, run_speed
    from linsight.runtime.device import pick_device
    from linsight.tasks import Shown
    from linsight.tasks.building import image_size
    from linsight.train import load_trained

    trained = load_trained(run)
    height, width = image_size(trained.recipe, trained.model)
    sizes = [(height * times, width * times) for times in _TIMES]
    threads = torch.get_num_threads()
    rows = run_speed(run, sizes, Setting(str(pick_device(device)), threads=threads, seconds=SECONDS))
    ours, softmax = ([row for row in rows if bool(row["beside"]) == own] for own in (True, False))

    def told(row: Any, key: str, unit: str) -> str:
        value = row.get(key)
        return row["error"] or "" if value is None else f"{value:,.3g} {unit}"

    cells = [
        (
            f"{a['infer_img_size']} pixels",
            *(told(row, "infer_step_time", "ms") for row in (a, b)),
            "" if a.get("infer_ratio") is None else f"{a['infer_ratio']:.2f}",
            *(told(row, "infer_peak_mb", "MB") for row in (a, b)),
        )
        for a, b in zip(ours, softmax, strict=True)
    ]
    head = ("one image", "this run", "softmax", "time beside softmax", "memory", "memory of softmax")
    said = f"Measured now, in float32: medians of rounds that take turns. Threads of the CPU: {threads}."
    return Shown("Speed beside softmax", said, head, cells)
