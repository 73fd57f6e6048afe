"""Names that users chose, as they are shown: on one line, and no longer than there is room."""

import unicodedata
from collections.abc import Sequence

_BREAKS = " _-.,;:/"  # behind which a line may end
# Control characters, halves of surrogate pairs (bytes of a file name that are no UTF-8), line and paragraph ends.
_UNSEEN = {"Cc", "Cs", "Zl", "Zp"}


def printable(text: str) -> str:
    r"""`text` on one line that can be written anywhere: a line feed is shown as `\n`, a byte of no text as `\udcff`."""
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in _UNSEEN else letter
        for letter in text
    )


def cells(text: str) -> int:
    """The columns of a fixed-width font that `text` takes: Chinese letters and pictograms two, accents none."""
    return sum(map(_width, text))


def _width(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def shorten(text: str, room: int) -> str:
    """`text` on one line of at most `room` columns: of a longer one its ends, as names often differ at their end."""
    text = printable(text)
    if cells(text) <= room:
        return text
    head = _first(text, (room - 1) * 2 // 3)
    tail = _first(text[::-1], room - 1 - cells(head))[::-1]
    return f"{head}…{tail}"


def folded(text: str, room: int, lines: int) -> Sequence[str]:
    """`text` in at most `lines` lines of `room` columns, broken behind spaces and signs where there are any."""
    left = shorten(text, room * lines)
    found: list[str] = []
    while cells(left) > room and len(found) < lines - 1:
        line = _first(left, room)
        at = max(place + 1 for place, letter in enumerate(f" {line}") if letter in _BREAKS) - 1
        # a break must leave enough room for what follows
        fits = cells(left[at:]) <= room * (lines - len(found) - 1)
        line = left[:at] if at >= len(line) // 2 and fits else line
        found.append(line.strip())
        left = left[len(line) :]
    return [*found, shorten(left.strip(), room)]


def _first(text: str, room: int) -> str:
    """The first letters of `text` that fit in `room` columns."""
    used = 0
    for place, letter in enumerate(text):
        used += _width(letter)
        if used > room:
            return text[:place]
    return text
