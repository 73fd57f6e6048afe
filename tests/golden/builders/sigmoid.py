"""Sigmoid attention's layer, whose bias is stored."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def sigmoid_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens."""
    x = tensor(spec["input_shape"])
    layer = linsight.create_attention("sigmoid", x.shape[2], spec["trace"]["q_norm"]["shape"][1], bias="stored")
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"sigmoid_op": sigmoid_op}
