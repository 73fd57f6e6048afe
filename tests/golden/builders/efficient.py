"""Efficient attention on an image."""

from typing import Any

from torch import Tensor

import linsight
from golden.spec import Run, heads, tensor
from linsight import Grid


def efficient_op(spec: dict[str, Any]) -> Run:
    """The layer on an image, with the residual that belongs to the block here."""
    x = tensor(spec["input_shape"])
    _, channels, height, width = x.shape
    layer = linsight.create_attention("efficient", channels, heads(spec), projections="q_k_v")

    def call() -> Tensor:
        out = layer(x.flatten(2).transpose(1, 2), Grid(height, width))
        return x + out.transpose(1, 2).unflatten(2, (height, width))

    return Run(layer, call)


BUILDERS = {"efficient_op": efficient_op}
