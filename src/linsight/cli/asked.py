"""Options that several commands have, and how they tell what is found."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from linsight.recipe import Recipe
from linsight.runtime.text import printable

from .show import make_table, terminal

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Device = Annotated[str, typer.Option(help=Recipe.help("device"))]
Amp = Annotated[str, typer.Option(help=Recipe.help("amp"))]
From = Annotated[
    str | None, typer.Option(metavar="N,N", help="size of the images --checkpoint was made for, if it does not tell")
]
Size = Annotated[
    str | None, typer.Option(metavar="N,N", help="side of the images, or height and width; none: the model's own")
]
Bad = Annotated[str, typer.Option(metavar="skip|refuse", help=Recipe.help("on_bad_image"))]
Fill = Annotated[float | None, typer.Option(help=Recipe.help("fill"))]


def check(settings: Mapping[str, Any]) -> None:
    """Refuse a value that no run can have, before anything is read."""
    for name, value in settings.items():
        if name in Recipe.model_fields and value is not None:
            Recipe.parse(name, value)


def print_facts(rows: list[list[str]]) -> None:
    """A table of names and values."""
    terminal().print(make_table("", ["", ""], rows, header=False))


def tell(notes: list[str]) -> None:
    """Notes, on standard error."""
    for line in notes:
        typer.echo(f"linsight: {printable(line)}", err=True)


def tell_bad(bad: list[str]) -> None:
    """Lines on images that were left out, on standard error."""
    for line in bad[:10]:
        typer.echo(f"linsight: skipped {printable(line)}", err=True)
    if len(bad) > 10:
        typer.echo(f"linsight: skipped {len(bad) - 10} more", err=True)
