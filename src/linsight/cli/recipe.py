"""The command recipe: recipes as people write them."""

from typing import Annotated

import typer

from linsight.errors import LinsightError
from linsight.runtime.files import to_json

from .show import Json, make_table, terminal


def recipe(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="a recipe; none: all are listed")] = None,
    changed: Annotated[bool, typer.Option("--changed", help="only what differs from the defaults")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="the JSON schema of recipe files, for editors")] = False,
    task: Annotated[str | None, typer.Option(help="the task that --schema is of; default: classify")] = None,
    as_json: Json = False,
) -> None:
    """Print a recipe, every field with what it is for, as a file that 'linsight train --recipe FILE' takes.

    linsight recipe cifar10 > mine.yaml
    """
    from linsight.tasks.files import schema as schema_of
    from linsight.tasks.files import written
    from linsight.train import RECIPES, resolve

    if schema:
        typer.echo(to_json(schema_of("classify" if task is None else task), indent=2))
        return
    if task is not None:
        raise LinsightError("--task is for --schema: add it")
    if name is None:
        if as_json:
            typer.echo(to_json({key: shipped.about for key, shipped in RECIPES.items()}))
            return
        rows = [[key, shipped.about] for key, shipped in RECIPES.items()]
        terminal().print(make_table("", ["recipe", "about"], rows))
        return
    found = resolve(name)
    if as_json:
        typer.echo(to_json(found.differences() if changed else found.values()))
        return
    about = RECIPES[name].about if name in RECIPES else ""
    typer.echo(written(found, about=about, all_fields=not changed), nl=False)
