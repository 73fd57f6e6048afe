"""Which mechanism stands where: `attention="inline"`, or one a stage, or the first k blocks."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from linsight.attention import Mechanism, mechanism
from linsight.errors import LinsightError

DEEPEST = 1000  # blocks of a stage


class Choice(NamedTuple):
    """A mechanism and its options, for the block `index` of a model."""

    name: str
    options: Mapping[str, Any]
    index: int = 0  # type: ignore[assignment]  # also a method of tuples


def plan(attention: str, depths: Sequence[int], options: Mapping[str, Any] | None = None) -> list[list[Choice]]:
    """One `Choice` for each block of each stage.

    attention: "inline" everywhere; "inline,inline,softmax,softmax" one a stage; in place of a name,
        "inline:2/softmax" is inline in the first 2 blocks of the stage and softmax after them;
        "softmax~inline" is softmax in the first block, inline in the second, and so on in turn.
    options: keyword arguments of the first mechanism named; the others keep their defaults. A list as value
        gives one to each stage, and "1~8" in the place of a value 1 to its first block, 8 to the second, and so on in
        turn.

    Raises:
        UnknownNameError: a mechanism that is not registered.
        LinsightError: as many stages are named, or values listed, as the host does not have; a stage too deep.
    """
    if max(depths, default=0) > DEEPEST:
        raise LinsightError(f"a stage of {max(depths)} blocks is none that can be meant: {DEEPEST} at most")
    stages = [part.strip() for part in attention.split(",")]
    if len(stages) == 1:
        stages *= len(depths)
    if len(stages) != len(depths):
        raise LinsightError(
            f"attention='{attention}' names {len(stages)} stages, but this host has {len(depths)}: "
            f"give one mechanism, or one for each stage"
        )
    first = names(stages[0])[0]
    given = _by_stage(options or {}, len(depths), mechanism(first))
    for row in given:
        for i in range(max(map(len, row.values()), default=0)):
            mechanism(first).check_options(_at(row, i))

    table: list[list[Choice]] = []
    for stage, depth, row in zip(stages, depths, given, strict=True):
        head, _, tail = (part.strip() for part in stage.partition("/"))
        name, _, count = (part.strip() for part in head.partition(":"))
        if bool(tail) != bool(count) or (count and not count.isdecimal()):
            raise LinsightError(f"attention='{stage}' is not understood: write NAME, or NAME:COUNT/NAME")
        blocks = min(int(count), depth) if count else depth
        start = sum(map(len, table))
        turns = [*_in_turn(name, blocks), *_in_turn(tail, depth - blocks)]
        table.append(
            [Choice(mechanism(n).name, _at(row, i) if n == first else {}, start + i) for i, n in enumerate(turns)]
        )
    return table


def names(attention: str) -> list[str]:
    """The names that stand in a plan, in their order.

    >>> names("inline,softmax~inline,inline:2/softmax")
    ['inline', 'softmax', 'inline', 'inline', 'softmax']
    """
    return [part.partition(":")[0].strip() for part in re.split("[,/~]", attention)]


def named(attention: str) -> list[Mechanism]:
    """The mechanisms that stand in `attention`."""
    return [mechanism(name) for name in names(attention)]


def _in_turn(joined: str, blocks: int) -> list[str]:
    """Names of blocks that take turns, as in "softmax~inline"."""
    turns = [name.strip() for name in joined.split("~")]
    return [turns[i % len(turns)] for i in range(blocks)]


def _by_stage(options: Mapping[str, Any], count: int, first: Mechanism) -> list[dict[str, list[Any]]]:
    """The options of each stage, as values that its blocks take in turn.

    JSON has no tuples: a list that is a value of the option is one.
    """
    rows: list[dict[str, list[Any]]] = [{} for _ in range(count)]
    for name, value in options.items():
        if not isinstance(value, list) or first.takes(name, value):
            value = [value] * count
        if len(value) != count:
            raise LinsightError(f"{name}={value} lists {len(value)} values, but this host has {count} stages")
        for row, one in zip(rows, value, strict=True):
            joined = isinstance(one, str) and "~" in one
            row[name] = [_value(part) for part in one.split("~")] if joined else [_as_tuple(one)]
    return rows


def _at(row: Mapping[str, Sequence[Any]], i: int) -> dict[str, Any]:
    """The options of block `i` of a stage."""
    return {name: values[i % len(values)] for name, values in row.items()}


def _value(text: str) -> Any:
    """A value written in JSON, or else a text."""
    try:
        return _as_tuple(json.loads(text))
    except ValueError:
        return text.strip()


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
