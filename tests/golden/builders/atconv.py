"""ATConv's layer on a map."""

import math
from typing import Any

import linsight
from golden.spec import Run, on_map


def atconv(spec: dict[str, Any]) -> Run:
    """The layer; its matrix tells the side of the kernels."""
    shape, shapes = spec["inputs"]["input"]["shape"], dict(spec["state_dict"])
    side = math.isqrt(shapes["kernel_gen.weight"][0])
    layer = linsight.create_attention("atconv", shape[1], 1, kernel_size=side)
    return Run(layer, on_map(layer, {"input_shape": shape}))


BUILDERS = {"atconv_": atconv}
