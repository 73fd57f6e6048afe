"""Figures of matplotlib, drawn without a display."""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from linsight.errors import LinsightError, MissingExtraError

from .files import replacing, writing
from .text import printable

# Fonts of systems that have letters which matplotlib's own lacks; where none is there, a letter is drawn as a box.
_MORE_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Hiragino Sans", "PingFang SC"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans Arabic", "Noto Sans Devanagari", "Nirmala UI"),
    *("Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Symbola", "Arial Unicode MS"),
)


def require_matplotlib(purpose: str) -> None:
    """Raise, before anything is computed, if `purpose` could not be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "train", purpose) from None


def require_picture(path: pathlib.Path) -> None:
    """Raise, before anything is computed, if no picture could be drawn into the file `path`.

    Raises:
        LinsightError: there is no such folder, or the suffix is not .svg, .png or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib("drawing the plot")
    if not path.parent.is_dir():
        raise LinsightError(f"'{path}' cannot be written: there is no folder '{path.parent}'")
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise LinsightError(f"'{path}' cannot be drawn: its name must end with .svg, .png or .pdf")


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw texts as they are, whatever the user's settings: `$` and `_` are letters, and a letter no font has is a box.

    What writes `$10^3$` itself, as matplotlib's own logarithmic ticks do, is no use here: give it a formatter.
    """
    import matplotlib
    from matplotlib.font_manager import fontManager

    known = set(fontManager.get_font_names())
    family = [*matplotlib.rcParams["font.family"], *(name for name in _MORE_FONTS if name in known)]
    plain: Any = {"text.parse_math": False, "text.usetex": False, "font.family": family}
    with matplotlib.rc_context(plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        warnings.filterwarnings("ignore", r"Matplotlib currently does not support", UserWarning)
        yield


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


class Label(NamedTuple):
    """A text beside the point (x, y) of a picture."""

    x: float
    y: float
    text: str
    color: str = "black"


def label_lines(axes: Any, ends: Sequence[Label], size: float = 8) -> None:
    """Write beside the picture what each line is, at the height of its end; lines that end close by are told apart.

    Call it once everything is drawn.
    """
    axes.figure.draw_without_rendering()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    step = 1.35 * size / height
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = sorted((float(to_axes.transform((end.x, end.y))[1]), place) for place, end in enumerate(ends))
    for (_, place), y in zip(wanted, _apart([y for y, _ in wanted], step), strict=True):
        end = ends[place]
        axes.annotate(
            printable(end.text),
            (end.x, end.y),
            xytext=(1.04, y),
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=end.color,
            arrowprops={
                "arrowstyle": "-",
                "color": end.color,
                "lw": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def _apart(values: Sequence[float], step: float) -> list[float]:
    """Sorted `values`, moved to lie `step` apart at least: those too close become a block about their mean."""
    blocks: list[list[float]] = []  # of each: where its first lies, and how many it has
    sums: list[float] = []  # of what the first of each block would like to be
    for value in values:
        blocks.append([value, 1])
        sums.append(value)
        while len(blocks) > 1 and blocks[-2][0] + step * blocks[-2][1] > blocks[-1][0]:
            _, count = blocks.pop()
            wish = sums.pop() - step * blocks[-1][1] * count
            sums[-1] += wish
            blocks[-1][1] += count
            blocks[-1][0] = sums[-1] / blocks[-1][1]
    return [first + step * place for first, count in blocks for place in range(int(count))]


def label_points(axes: Any, points: Sequence[Label], size: float = 8) -> None:
    """Write beside each point what it is, where it hides neither another point nor another text.

    Call it once everything is drawn.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent()
    dots = [axes.transData.transform((point.x, point.y)) for point in points]
    drawn = [line for line in axes.lines if line.get_linestyle() != "None"]
    curves = [line.get_transform().transform_path(line.get_path()) for line in drawn]
    taken: list[Any] = [axes.get_legend().get_window_extent()] if axes.get_legend() else []
    for point in points:
        text, at = printable(point.text), (point.x, point.y)
        note = axes.annotate(text, at, (0, 0), textcoords="offset points", fontsize=size, color=point.color)
        best: tuple[int, Any, Any] | None = None
        for place in _PLACES:
            note.set(**place)
            box = note.get_window_extent(renderer).padded(3)
            hidden = sum(box.overlaps(other) for other in taken) + sum(box.contains(*dot) for dot in dots)
            hidden += sum(curve.intersects_bbox(box, filled=False) for curve in curves)
            hidden += not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            if best is None or hidden < best[0]:
                best = (hidden, place, box)
        assert best is not None
        note.set(**best[1])
        taken.append(best[2])


_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
# Where a text may stand, in points from what it names: beside it, above, below, then further away.
_PLACES: Sequence[dict[str, Any]] = [
    {
        "position": (x * far, y * far),
        "ha": {1: "left", 0: "center", -1: "right"}[x],
        "va": {1: "bottom", 0: "center", -1: "top"}[y],
    }
    for far in (5, 12, 20)
    for x, y in _SIDES
]
