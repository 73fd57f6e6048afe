"""FaViT's factorisation attention on tokens."""

import re
from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def fasa(spec: dict[str, Any]) -> Run:
    """The layer on a square grid; only the name tells heads and reduction."""
    x = tensor(spec["inputs"]["input"]["shape"])
    told = re.fullmatch(r"fasa_d\d+_h(\d+)_g(\d+)_sr(\d+)", spec["name"])
    assert told, spec["name"]
    heads, side, ratio = map(int, told.groups())
    layer = linsight.create_attention("favit", x.shape[2], heads, sr_ratio=ratio)
    return Run(layer, lambda: layer(x, Grid(side, side)))


BUILDERS = {"fasa_": fasa}
