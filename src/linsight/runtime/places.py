"""Places that users name: as paths of the system, or refused in a line."""

import os
import pathlib

from linsight.errors import LinsightError

from .text import shorten

_ROOM = 160  # columns of a name that an error repeats


def located(given: str | os.PathLike[str]) -> pathlib.Path:
    """`given` as a path, in which `~` is the home of a user. Nothing needs to be there.

    Raises:
        LinsightError: it is empty, no name that a file can have, too long, in a home that there is not, in a circle of
            links, or the system does not let us look.
    """
    text = os.fspath(given)
    shown = f"'{shorten(text, _ROOM)}'"
    if not text:
        raise LinsightError("'' is the name of no file and no folder: give one ('.' is this folder)")
    try:
        if text.startswith("~") and not os.path.lexists(text):
            text = _at_home(text, shown)
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise LinsightError(f"{shown} cannot be used: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, LinsightError):
            raise
        raise LinsightError(f"{shown} is no name that a file can have: leave out what is no letter of it") from error
    return pathlib.Path(text)


def _at_home(text: str, shown: str) -> str:
    user = text.partition("/")[0]
    home = os.path.expanduser(user)
    way = f"write './{shorten(text, _ROOM)}' for a place of that name here"
    if home == user:
        raise LinsightError(f"{shown}: there is no home of '{shorten(user, _ROOM)}'; {way}")
    if not os.path.isdir(home):
        raise LinsightError(f"{shown}: the home '{home}' is no folder; {way}")
    return os.path.expanduser(text)
