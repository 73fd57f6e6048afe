"""Row and column attention on a map."""

from typing import Any

import linsight
from golden.spec import Run, heads, on_map


def axial(spec: dict[str, Any]) -> Run:
    """The layer; the name of the case tells the heads."""
    spec = {**spec, "input_shape": spec["inputs"]["input"]["shape"]}
    layer = linsight.create_attention("axial", spec["input_shape"][1], heads(spec))
    return Run(layer, on_map(layer, spec))


BUILDERS = {"axial_": axial}
