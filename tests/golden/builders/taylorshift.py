"""TaylorShift's layer on tokens, in both forms."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def taylorshift_op(spec: dict[str, Any]) -> Run:
    """The layer; the name of the operator tells the form."""
    x = tensor(spec["input_shape"])
    layer = linsight.create_attention(
        "taylorshift",
        spec["dim"],
        spec["heads"],
        form=spec["operator"].rpartition(" ")[2],
        normalize_input=spec.get("normalize_input", True),
        output_normalized=spec.get("output_normalized", False),
    )
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"taylorshift_op": taylorshift_op}
