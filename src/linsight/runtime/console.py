"""A console on which names that users chose are shown as they are."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def new_console(**options: Any) -> "Console":
    """A console of rich that takes text for text: no `[bold]`, no `:cat:`, no colours for numbers.

    options: of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def print_anything() -> None:
    """Let standard output and error take any text: letters that their encoding lacks are written as `\\xe9`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
