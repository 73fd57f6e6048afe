"""SOFT's layer, in both forms, on tokens of a square grid."""

import re
from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def soft_op(spec: dict[str, Any]) -> Run:
    """Heads, the grid and the ratio are in the name, kernels in the state."""
    x, shapes = tensor(spec["inputs"]["input"]["shape"]), dict(spec["state_dict"])
    named = re.search(r"_h(\d+)_g(\d+)_r(\d+)", spec["name"])
    assert named
    heads, side, ratio = map(int, named.groups())
    kernel = shapes.get("attn.conv.weight", [0])[-1]
    normalised = spec["name"].startswith("softnorm")
    layer = linsight.create_attention(
        "soft", x.shape[2], heads, ratio=ratio, kernel_size=kernel, normalised=normalised, start="original"
    )
    return Run(layer, lambda: layer(x, Grid(side, side)))


BUILDERS = {"soft_d": soft_op, "softnorm_d": soft_op}
