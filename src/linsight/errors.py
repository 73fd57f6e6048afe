"""The errors of linsight: each names the thing, the limit and the way out, in one line.

The command line prints them without a traceback and exits with code 2.
"""

import difflib
from collections.abc import Iterable


class LinsightError(ValueError):
    """Input that linsight cannot use. The message is one line a user can act on."""


class UnknownNameError(LinsightError):
    """A name that is not in a table; the message offers the one that is meant, if `here` tells it, or the nearest."""

    def __init__(self, kind: str, name: object, known: Iterable[str], hint: str = "", here: str = "") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
        offer = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names[:12]) or 'none'}"
        offer = f"it is '{here}' here" if here else offer
        name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
        super().__init__(f"unknown {kind} '{name}': {offer}{f' ({hint})' if hint else ''}")


class CapabilityError(LinsightError):
    """A mechanism was asked for something that its formula does not define."""


class CheckpointError(LinsightError):
    """A file that is no checkpoint, is damaged, is not safe to read, or belongs to another model."""


class ImageError(LinsightError):
    """An image file, or a part of an image, that cannot be read."""


def install_line(extra: str) -> str:
    """The command that installs an optional dependency of linsight, which is on no package index."""
    return f"pip install -e '.[{extra}]'"


class MissingExtraError(LinsightError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}': {install_line(extra)} in the source folder of linsight"
        )
