"""RALA's layer on a map, and the softmax form of its late stages."""

from typing import Any

import linsight
from golden.spec import Run, on_map
from linsight.attention import Rename

# The rotation belongs to a stage there.
RENAMES = (Rename("RoPE.", "core."), Rename("attn.", ""))


def rala_op(spec: dict[str, Any]) -> Run:
    """The layer on `(B, C, H, W)`."""
    layer = linsight.create_attention(spec["name"].partition("_op_")[0], spec["dim"], spec["heads"])
    return Run(layer, on_map(layer, spec), RENAMES)


BUILDERS = {"rala_op": rala_op, "rala_softmax_op": rala_op}
