"""L2ViT's attention on tokens."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def l2vit_op(spec: dict[str, Any]) -> Run:
    """The layer; its temperatures tell the heads."""
    x = tensor(spec["input_shape"])
    layer = linsight.create_attention("l2vit", x.shape[2], dict(spec["state_dict"])["temperature"][0])
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"l2vit_op": l2vit_op}
