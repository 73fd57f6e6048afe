"""Figures of matplotlib, drawn without a display."""

import pathlib
from typing import Any

from linsight.errors import MissingExtraError

from .files import replacing, writing


def require_matplotlib(purpose: str) -> None:
    """Raise, before anything is computed, if `purpose` could not be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "train", purpose) from None


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Write a picture of the kind that the suffix of `path` says, in one move."""
    with writing(path), replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
