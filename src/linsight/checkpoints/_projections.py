"""Projections of queries, keys and values, fused or apart, and tensors in parts: as the other side has them."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from linsight.attention import PUBLISHED_PROJECTIONS, Attention, Projection


class Entry(NamedTuple):
    """A tensor and the published key, or keys, that it comes from."""

    key: str
    tensor: Tensor


def regroup(entries: dict[str, Entry], prefix: str, layout: str, heads: int) -> None:
    """Join or split rows of the projections under `prefix`, of so many heads, into those of `layout`, in place.

    Rows that cannot be regrouped stay as they are; the comparison of shapes then tells.
    """
    for leaf in ("weight", "bias"):
        for name, source in PUBLISHED_PROJECTIONS.items():
            keys = [f"{prefix}{projection.name}.{leaf}" for projection in source]
            if name != layout and _parts(name) == _parts(layout) and all(key in entries for key in keys):
                rows = _rows([entries[key] for key in keys], source, heads)
                if rows:
                    for key in keys:
                        del entries[key]
                    for projection in PUBLISHED_PROJECTIONS[layout]:
                        entries[f"{prefix}{projection.name}.{leaf}"] = _of_parts(rows, projection, heads)
                break


def share(entries: dict[str, Entry], pattern: str, count: int) -> None:
    """Cut the tensor that lies in the parts `pattern` into `count` parts along its first side, in place.

    pattern: a key with {} for the number of the part. Rows that `count` does not divide stay as they are.
    """
    keys = list(itertools.takewhile(entries.__contains__, map(pattern.format, itertools.count())))
    parts = [entries[key] for key in keys]
    if len(parts) in (0, count) or len({part.tensor.shape[1:] for part in parts if part.tensor.ndim}) != 1:
        return
    whole = _joined(parts)
    if whole.tensor.shape[0] % count == 0:
        for key in keys:
            del entries[key]
        for i, tensor in enumerate(whole.tensor.chunk(count)):
            entries[pattern.format(i)] = Entry(whole.key, tensor)


def _rows(entries: list[Entry], source: tuple[Projection, ...], heads: int) -> dict[str, Entry]:
    """The rows of each part; empty where the tensors are not of one kind."""
    rows: dict[str, Entry] = {}
    for (key, tensor), projection in zip(entries, source, strict=True):
        count = len(projection.parts)
        if not tensor.ndim or tensor.shape[0] % (count * heads if projection.by_head else count):
            return {}
        if projection.by_head:
            tensor = tensor.unflatten(0, (heads, count, -1)).transpose(0, 1).flatten(0, 2)
        rows |= {part: Entry(key, t) for part, t in zip(projection.parts, tensor.chunk(count), strict=True)}
    return rows if len({entry.tensor.shape[1:] for entry in rows.values()}) == 1 else {}


def _of_parts(rows: dict[str, Entry], projection: Projection, heads: int) -> Entry:
    """The tensor of a projection, of the rows of its parts."""
    whole = _joined([rows[part] for part in projection.parts])
    if not projection.by_head or whole.tensor.shape[0] % (len(projection.parts) * heads):
        return whole
    return Entry(whole.key, whole.tensor.unflatten(0, (len(projection.parts), heads, -1)).transpose(0, 1).flatten(0, 2))


def _joined(entries: list[Entry]) -> Entry:
    names = " + ".join(dict.fromkeys(entry.key for entry in entries))
    return Entry(names, torch.cat([entry.tensor for entry in entries]))


def published_projections(layer: Attention) -> str:
    """The name of the projections in the mechanism's key map; the layer's own where it speaks of them, or of none."""
    named = {rule.ours.rstrip(".") for rule in layer.published + layer.core.published}
    parts = _parts(layer.layout_name)
    return next(
        (
            name
            for name in (layer.layout_name, *PUBLISHED_PROJECTIONS)
            if {p.name for p in PUBLISHED_PROJECTIONS[name]} <= named and _parts(name) == parts
        ),
        layer.layout_name,
    )


def _parts(layout: str) -> set[str]:
    return {part for projection in PUBLISHED_PROJECTIONS[layout] for part in projection.parts}
