"""The command line: `linsight train | eval | predict | list | info | doctor`.

Commands import what they need when they run, so `linsight --help` stays quick. Anything a user can
mend is a LinsightError: one line on standard error, exit code 2.
"""

import sys

import typer

from linsight.errors import LinsightError

app = typer.Typer(
    name="linsight",
    help="Linear-time attention for vision: train, evaluate and compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the `linsight` command."""
    try:
        app()
    except LinsightError as error:
        print(f"linsight: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
