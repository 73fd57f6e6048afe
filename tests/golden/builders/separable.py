"""MobileViTv2's separable attention on unfolded patches."""

from typing import Any

from torch import Tensor

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def separable(spec: dict[str, Any]) -> Run:
    """The layer on `(B, C, P, N)`: the N patches of each of P places alone."""
    x = tensor(spec["inputs"]["input"]["shape"])
    batch, dim, places, patches = x.shape
    layer = linsight.create_attention("separable", dim, 1)

    def call() -> Tensor:
        out = layer(x.permute(0, 2, 3, 1).flatten(0, 1), Grid(1, patches))
        return out.unflatten(0, (batch, places)).permute(0, 3, 1, 2)

    return Run(layer, call)


BUILDERS = {"separable_": separable}
