"""HiLo on tokens of a square grid."""

import re
from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def hilo(spec: dict[str, Any]) -> Run:
    """Heads, the grid, the window and alpha are in the name."""
    named = re.fullmatch(r"hilo_d\d+_h(\d+)_g(\d+)_w(\d+)_a(\d+)", spec["name"])
    assert named
    heads, side, window, share = map(int, named.groups())
    x = tensor(spec["inputs"]["input"]["shape"])
    layer = linsight.create_attention("hilo", x.shape[2], heads, window_size=window, alpha=share / 100)
    return Run(layer, lambda: layer(x, Grid(side, side)))


BUILDERS = {"hilo_d": hilo}
