"""ConViT's layer on tokens of a square grid."""

import math
from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def gpsa(spec: dict[str, Any]) -> Run:
    """Gates tell the heads."""
    x, shapes = tensor(spec["inputs"]["input"]["shape"]), dict(spec["state_dict"])
    side = math.isqrt(x.shape[1])
    layer = linsight.create_attention("gpsa", x.shape[2], shapes["gating_param"][0])
    return Run(layer, lambda: layer(x, Grid(side, side)))


BUILDERS = {"gpsa_": gpsa}
