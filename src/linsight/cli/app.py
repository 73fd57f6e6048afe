"""The command line: `linsight train | eval | predict | bench | advise | list | info | doctor`.

Commands import what they need when they run. Anything a user can mend is a LinsightError: one line
on standard error, exit code 2.
"""

import sys
from typing import Annotated, Any

import typer

from linsight import __version__
from linsight.errors import LinsightError

from . import bench, show, train

app = typer.Typer(name="linsight", add_completion=False, pretty_exceptions_enable=False)
for module in (train, bench, show):
    module.register(app)

# typer's own copy of click has no public name for it
_UsageError: Any = typer.BadParameter.__bases__[0]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Linear-time attention for vision: train, evaluate and compare."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the `linsight` command."""
    try:
        sys.exit(app(standalone_mode=False))
    except LinsightError as error:
        _fail(str(error))
    except _UsageError as error:
        _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"linsight: {message}", file=sys.stderr)
    sys.exit(2)
