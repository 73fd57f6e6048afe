"""Which mechanism stands where: `attention="inline"`, or one a stage, or the first k blocks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from linsight.attention import mechanism
from linsight.errors import LinsightError


class Choice(NamedTuple):
    """A mechanism and its options, for one block."""

    name: str
    options: Mapping[str, Any]


def plan(attention: str, depths: Sequence[int], options: Mapping[str, Any] | None = None) -> list[list[Choice]]:
    """One `Choice` for each block of each stage.

    attention: "inline" everywhere; "inline,inline,softmax,softmax" one a stage; in place of a name,
        "inline:2/softmax" is inline in the first 2 blocks of the stage and softmax after them.
    options: keyword arguments of the first mechanism named; the others keep their defaults.

    Raises:
        UnknownNameError: a mechanism that is not registered.
        LinsightError: as many stages are named as the host does not have.
    """
    stages = [part.strip() for part in attention.split(",")]
    if len(stages) == 1:
        stages *= len(depths)
    if len(stages) != len(depths):
        raise LinsightError(
            f"attention='{attention}' names {len(stages)} stages, but this host has {len(depths)}: "
            f"give one mechanism, or one for each stage"
        )
    first = re.split(r"[:/]", stages[0])[0].strip()
    mechanism(first).check_options(dict(options or {}))

    def choice(name: str) -> Choice:
        return Choice(mechanism(name).name, dict(options or {}) if name == first else {})

    table = []
    for stage, depth in zip(stages, depths, strict=True):
        head, _, tail = (part.strip() for part in stage.partition("/"))
        name, _, count = (part.strip() for part in head.partition(":"))
        if bool(tail) != bool(count) or (count and not count.isdecimal()):
            raise LinsightError(f"attention='{stage}' is not understood: write NAME, or NAME:COUNT/NAME")
        blocks = min(int(count), depth) if count else depth
        table.append([choice(name)] * blocks + ([choice(tail)] * (depth - blocks) if tail else []))
    return table
