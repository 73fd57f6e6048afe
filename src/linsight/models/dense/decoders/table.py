"""The table of decoders: names, and what makes them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from linsight.attention import Paper
from linsight.errors import LinsightError, UnknownNameError

from .base import Decoder


class DecoderRow(NamedTuple):
    """A decoder by name.

    make: its class.
    about: what it does, in a line.
    width: its channels where nobody says.
    auxiliary: it is published with an auxiliary head.
    """

    name: str
    make: type[Decoder]
    about: str
    width: int
    paper: Paper
    auxiliary: bool = False


DECODERS: dict[str, DecoderRow] = {}


def add_decoders(*rows: DecoderRow) -> None:
    """Make decoders known to `create_segmenter`."""
    for row in rows:
        DECODERS[row.name] = row


def decoder_row(name: str) -> DecoderRow:
    """The row of a decoder.

    Raises:
        UnknownNameError: there is none of this name.
    """
    if not isinstance(name, str) or name not in DECODERS:
        raise UnknownNameError("decoder", name, DECODERS)
    return DECODERS[name]


def create_decoder(
    name: str, channels: Sequence[int], num_classes: int, *, width: int | None = None, **options: Any
) -> Decoder:
    """A decoder by name, for maps of these channels, the finest first.

    width: its channels, by default those it was published with.
    options: of the decoder, as dropout, device and dtype.

    Raises:
        UnknownNameError: there is none of this name.
        LinsightError: it has no such option, or not at this value.
    """
    row = decoder_row(name)
    width = row.width if width is None else width
    for key, value in (("num_classes", num_classes), ("width", width)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LinsightError(f"{key}={value} of the decoder '{name}' must be a whole number, 1 or more")
    try:
        return row.make(channels, num_classes, width, **options)
    except TypeError as error:
        raise LinsightError(f"the decoder '{name}' cannot be built with {', '.join(options)}: {error}") from error
