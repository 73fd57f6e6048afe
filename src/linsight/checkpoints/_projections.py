"""Projections of queries, keys and values, fused or apart, and tensors in parts: as the other side has them."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from linsight.attention import PROJECTIONS, Attention, Projection


class Entry(NamedTuple):
    """A tensor and the published key, or keys, that it comes from."""

    key: str
    tensor: Tensor


def regroup(entries: dict[str, Entry], prefix: str, layout: str) -> None:
    """Join or split rows of the projections under `prefix` into those of `layout`, in place.

    Rows that cannot be regrouped stay as they are; the comparison of shapes then tells.
    """
    for leaf in ("weight", "bias"):
        for name, source in PROJECTIONS.items():
            keys = [f"{prefix}{projection.name}.{leaf}" for projection in source]
            if name != layout and _parts(name) == _parts(layout) and all(key in entries for key in keys):
                rows = _rows([entries[key] for key in keys], source)
                if rows:
                    for key in keys:
                        del entries[key]
                    for projection in PROJECTIONS[layout]:
                        entries[f"{prefix}{projection.name}.{leaf}"] = _joined([rows[p] for p in projection.parts])
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


def _rows(entries: list[Entry], source: tuple[Projection, ...]) -> dict[str, Entry]:
    """The rows of each part; empty where the tensors are not of one kind."""
    rows: dict[str, Entry] = {}
    for entry, projection in zip(entries, source, strict=True):
        count = len(projection.parts)
        if not entry.tensor.ndim or entry.tensor.shape[0] % count:
            return {}
        rows |= {part: Entry(entry.key, t) for part, t in zip(projection.parts, entry.tensor.chunk(count), strict=True)}
    return rows if len({entry.tensor.shape[1:] for entry in rows.values()}) == 1 else {}


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
            for name in (layer.layout_name, *PROJECTIONS)
            if {p.name for p in PROJECTIONS[name]} <= named and _parts(name) == parts
        ),
        layer.layout_name,
    )


def _parts(layout: str) -> set[str]:
    return {part for projection in PROJECTIONS[layout] for part in projection.parts}
