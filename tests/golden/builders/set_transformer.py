"""Induced set attention on tokens, and pooling by attention."""

import re
from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention.mechanisms.set_transformer import PMA, SAB


def heads(spec: dict[str, Any]) -> int:
    """Only the name tells them."""
    named = re.search(r"_h(\d+)", spec["name"])
    assert named
    return int(named[1])


def isab(spec: dict[str, Any]) -> Run:
    """The layer."""
    x, shapes = tensor(spec["inputs"]["input"]["shape"]), dict(spec["state_dict"])
    layer = linsight.create_attention(
        "set_transformer", x.shape[2], heads(spec), points=shapes["I"][1], norm="mab0.ln0.weight" in shapes
    )
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


def pma(spec: dict[str, Any]) -> Run:
    """Pooling to seeds."""
    x, shapes = tensor(spec["inputs"]["input"]["shape"]), dict(spec["state_dict"])
    pool = PMA(x.shape[2], heads(spec), shapes["S"][1], norm="mab.ln0.weight" in shapes)
    return Run(pool, lambda: pool(x))


def sab(spec: dict[str, Any]) -> Run:
    """Self-attention in a block."""
    x, shapes = tensor(spec["inputs"]["input"]["shape"]), dict(spec["state_dict"])
    block = SAB(x.shape[2], heads(spec), norm="mab.ln0.weight" in shapes)
    return Run(block, lambda: block(x))


BUILDERS = {"isab_": isab, "pma_": pma, "sab_": sab}
