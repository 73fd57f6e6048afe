"""`linsight report`: the page of a run."""

from typing import Annotated

import typer

from linsight.recipe import Recipe

from .show import Command


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(cls=Command)(report)


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run, which has ended or was stopped")],
    out: Annotated[str | None, typer.Option(metavar="FILE", help="none: report.html in the folder")] = None,
    device: Annotated[str, typer.Option(help=Recipe.help("device"))] = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help=Recipe.help("workers"))] = None,
) -> None:
    """Write the page of a run anew: curves, confusion, worst mistakes, speed, recipe, machine, in one file of HTML.

    A run writes it at its end. The best weights look at the images that they were evaluated on once more.
    """
    from linsight.train import write_report

    typer.echo(str(write_report(run, out=out, device=device, workers=workers)))
