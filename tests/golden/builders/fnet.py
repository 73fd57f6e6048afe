"""FNet's mixing of tokens."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def fnet(spec: dict[str, Any]) -> Run:
    """The layer on tokens, as one row."""
    x = tensor(spec["inputs"]["input"]["shape"])
    layer = linsight.create_attention("fnet", x.shape[2], 1)
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"fnet_": fnet}
