"""Selective attention's layer, causal as published."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def selective_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens; only the name tells the heads."""
    x = tensor(spec["input_shape"])
    heads = int(spec["name"].rpartition("_n")[0].rpartition("h")[2])
    layer = linsight.create_attention("selective", x.shape[2], heads, causal=True)
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"selective_op": selective_op}
