"""Test-time-training attention of ViT^3."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention import Rename


def ttt_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens, its input scaled as the case says."""
    op = spec["op"]
    x = (tensor(spec["input_shape"]) * spec["inputs"][0].get("scale", 1.0)).requires_grad_("gradients" in spec)
    options = {"rotary": op["rope"], "inner_lr": op["inner_lr"], "qkv_bias": op["qkv_bias"]}
    layer = linsight.create_attention("ttt", op["dim"], op["num_heads"], **options)
    return Run(layer, lambda: layer(x, Grid(*op["grid"])), (Rename("attn.", ""),), {"input": x})


BUILDERS = {"ttt_op": ttt_op}
