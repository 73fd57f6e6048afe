"""LinFusion's layer."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def layer(spec: dict[str, Any]) -> Run:
    """The layer on tokens, which do not care where they lie."""
    config, x, keys = spec["config"], tensor(spec["input_shape"]), {key for key, _ in spec["state_dict"]}
    made = linsight.create_attention(
        "linfusion",
        config["query_dim"],
        config["heads"],
        mid_dim=config["projection_mid_dim"] or 0,
        qkv_bias="to_q.bias" in keys,
    )
    return Run(made, lambda: made(x, Grid(1, x.shape[1])))


BUILDERS = {"linfusion_op": layer}
