"""The command line: `linsight train | linearize | report | eval | predict | merge | export | push | bench | ...`.

Commands import what they need when they run. Anything a user can mend is a LinsightError: one line
on standard error, exit code 2.
"""

import io
import sys
from typing import Annotated, Any

import typer

from linsight import __version__
from linsight.errors import LinsightError
from linsight.runtime.launch import this_copy
from linsight.runtime.signals import Interrupted, Stop, drop_output, exit_code
from linsight.runtime.text import printable

from . import bags, bench, convert, export, prune, push, report, show, slide, train

app = typer.Typer(name="linsight", add_completion=False, pretty_exceptions_enable=False)
for module in (train, slide, bags, convert, prune, report, export, push, bench, show):
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal has no letters for
    try:
        with Stop():  # until a command runs, which hears it then
            sys.exit(_run())
    except BrokenPipeError:  # whoever read has read enough, as `head`
        drop_output()
        sys.exit(1)


def _run() -> int:
    """Run the command; its exit code."""
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return int(code or 0)
    except Interrupted as stopped:
        # of several processes, all of which were asked, one tells
        return _fail(str(stopped), stopped.code) if this_copy().rank == 0 else stopped.code
    except LinsightError as error:
        return _fail(str(error))
    except _UsageError as error:
        return _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt) as stopped:
        return _fail("stopped", exit_code(stopped))


def _fail(message: str, code: int = 2) -> int:
    print(f"linsight: {printable(message)}", file=sys.stderr)
    return code
