"""Focused linear attention in each of its hosts."""

from typing import Any

import linsight
from golden.spec import REDUCTION, Run, heads, tensor
from linsight import Grid
from linsight.attention import create_core
from linsight.models.hosts.cswin import Branch


def focused_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens; of CSwin, whose block owns the projections, the core."""
    config, x = spec["config"], tensor(spec["input_shape"])
    dim, num_heads, grid = config["dim"], heads(spec), Grid(*config["grid"])
    options = {"power": config["focusing_factor"], "kernel_size": config["kernel_size"], "grid": grid[:2]}
    if config["host"] == "cswin":
        branch = Branch(create_core("focused", dim, num_heads, **options), dim)
        return Run(branch, lambda: branch(x.movedim(0, 2), grid, x[0]))
    if config["host"] != "swin":
        coarser = {"pool": 7} if config.get("linear") else {"reduction": config["sr_ratio"]}
        options |= {"projections": "q_kv", **coarser}
    layer = linsight.create_attention("focused", dim, num_heads, **options)
    return Run(layer, lambda: layer(x, grid), REDUCTION)


BUILDERS = {"focused_op": focused_op}
