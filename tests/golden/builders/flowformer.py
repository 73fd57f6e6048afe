"""Flow attention: the layer of the vision code, and that of the code for sequences."""

from typing import Any

import linsight
from golden.spec import Run, heads, tensor
from linsight import Grid
from linsight.attention import Rename


def flowformer_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens, of one sequence or of two."""
    x, name = tensor(spec["input_shape"]), spec["name"]
    vision = "_cv_" in name
    layer = linsight.create_attention(
        "flowformer_causal" if "causal" in name else "flowformer",
        x.shape[2],
        heads(spec),
        projections="qkv" if vision else "q_k_v",
        **({} if "causal" in name else {"form": "vision" if vision else "reference"}),
    )
    grid, beside = Grid(1, x.shape[1]), {}
    if "cross" in name:
        context = tensor(spec["inputs"]["context"], "context")
        beside = {"context": context, "context_layout": Grid(1, context.shape[1])}
    return Run(layer, lambda: layer(x, grid, **beside), (Rename("attn.", ""),))


BUILDERS = {"flowformer_op": flowformer_op}
