"""Which of the feature maps of a model are meant: in order, each once, or one line that says why not."""

from collections.abc import Sequence
from typing import Any

from linsight.errors import LinsightError

Indices = int | Sequence[int] | None


def in_order(indices: Any, count: int) -> list[int]:
    """The maps `indices` of `count`, counted from 0, in the order in which a model makes them.

    indices: None for all, a number for the last ones, else their numbers, negative ones from the end.

    Raises:
        LinsightError: there is no such map, one is named twice, or none.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 0 < indices <= count:
            raise LinsightError(f"the last {indices} of {count} maps: give a number from 1 to {count}, or their places")
        return list(range(count - indices, count))
    try:
        places = [int(i.__index__()) for i in indices]
    except (AttributeError, TypeError):
        raise LinsightError(f"indices={indices!r} are no places of maps: give whole numbers, as in (0, 2)") from None
    if not places:
        raise LinsightError(f"indices={indices!r} name no map: give some of 0 to {count - 1}, or None for all")
    for place in places:
        if not -count <= place < count:
            raise LinsightError(f"there is no map {place}: this model has {count}, from 0 to {count - 1}")
    taken = sorted(place % count for place in places)
    if len(set(taken)) < len(taken):
        raise LinsightError(f"indices={indices!r} name a map twice: give each once")
    return taken
