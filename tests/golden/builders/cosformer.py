"""cosFormer's layer on a sequence."""

import re
from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def cosformer_op(spec: dict[str, Any]) -> Run:
    """The layer on `(N, batch, C)`; the name of the case tells the heads."""
    found, x = re.search(r"d\d+h(\d+)", spec["name"]), tensor(spec["input_shape"])
    assert found
    layer = linsight.create_attention("cosformer", x.shape[2], int(found[1]), causal=spec["causal"])
    return Run(layer, lambda: layer(x.transpose(0, 1), Grid(1, len(x))).transpose(0, 1))


BUILDERS = {"cosformer_op": cosformer_op}
