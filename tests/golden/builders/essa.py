"""ESSA on tokens."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def essa(spec: dict[str, Any]) -> Run:
    """The layer, with one head as published."""
    x = tensor(spec["inputs"]["input"]["shape"])
    layer = linsight.create_attention("essa", x.shape[2], 1)
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"essa_": essa}
