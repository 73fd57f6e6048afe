"""Varied-size window attention on a map."""

import math
from typing import Any

import linsight
from golden.spec import Run, on_map


def vsa(spec: dict[str, Any]) -> Run:
    """The layer; its table tells the window and the heads."""
    spec = {**spec, "input_shape": spec["inputs"]["input"]["shape"]}
    rows, heads = dict(spec["state_dict"])["relative_position_bias_table"]
    layer = linsight.create_attention("vsa", spec["input_shape"][1], heads, window=(math.isqrt(rows) + 1) // 2)
    return Run(layer, on_map(layer, spec))


BUILDERS = {"vsa_": vsa}
