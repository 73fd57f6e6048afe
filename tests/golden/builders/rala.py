"""RALA's layer on a map, and the softmax form of its late stages."""

from typing import Any

from torch import Tensor

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention import Rename

# The rotation belongs to a stage there.
RENAMES = (Rename("RoPE.", "core."), Rename("attn.", ""))


def rala_op(spec: dict[str, Any]) -> Run:
    """The layer on `(B, C, H, W)`."""
    x, name = tensor(spec["input_shape"]), "rala_softmax" if "softmax" in spec["name"] else "rala"
    layer = linsight.create_attention(name, spec["dim"], spec["heads"])

    def call() -> Tensor:
        out = layer(x.flatten(2).transpose(1, 2), Grid(*spec["grid"]))
        return out.transpose(1, 2).unflatten(2, spec["grid"])

    return Run(layer, call, RENAMES)


BUILDERS = {"rala_op": rala_op, "rala_softmax_op": rala_op}
