"""PolaFormer's layer, of PVT and of Swin."""

from typing import Any

import linsight
from golden.spec import REDUCTION, Run, tensor
from linsight import Grid


def polaformer_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens."""
    x, grid = tensor(spec["input_shape"]), Grid(*spec["grid"])
    layer = linsight.create_attention(
        "polaformer",
        spec["dim"],
        spec["heads"],
        alpha=spec["alpha"],
        kernel_size=spec["kernel_size"],
        grid=grid[:2],
        qkv_bias=spec["qkv_bias"],
        projections="qx_kv" if "_pvt_" in spec["name"] else "qkvx",
        reduction=spec.get("sr_ratio", 1),
    )
    return Run(layer, lambda: layer(x, grid), REDUCTION)


BUILDERS = {"polaformer_op": polaformer_op}
