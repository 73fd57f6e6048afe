"""EcoFormer's layer on tokens."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def ecoformer_op(spec: dict[str, Any]) -> Run:
    """The hash tells heads, bits and anchors."""
    x, shapes = tensor(spec["input_shape"]), dict(spec["state_dict"])
    heads, bits, anchors = shapes["fast_attention.ksh.A"]
    layer = linsight.create_attention("ecoformer", x.shape[2], heads, bits=bits, anchors=anchors)
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"ecoformer_op": ecoformer_op}
