"""A console on which names that users chose are shown as they are."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def new_console(**options: Any) -> "Console":
    """A console of rich that takes text for text: no `[bold]`, no `:cat:`, no colours for numbers.

    options: of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)
