"""SwiftFormer's additive attention on tokens."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def additive(spec: dict[str, Any]) -> Run:
    """The layer; heads have no effect."""
    x = tensor(spec["inputs"]["input"]["shape"])
    layer = linsight.create_attention("additive", x.shape[2], 1)
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"additive_": additive}
