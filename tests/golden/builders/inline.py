"""InLine in each of its hosts."""

from typing import Any

import linsight
from golden.spec import Run, heads, tensor
from linsight import Grid
from linsight.attention import create_core
from linsight.models.hosts.cswin import Branch


def inline_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens; of CSwin, whose block owns the projections, the core."""
    config = spec["config"]
    dim, num_heads, (height, width) = config["dim"], heads(spec), config["grid"]
    x = tensor(spec["input_shape"])
    if config["host"] == "cswin":
        branch = Branch(create_core("inline", dim, num_heads), dim)
        mean = tensor([x.shape[1], dim], "x_mean")[:, None].expand(-1, height * width, -1)
        return Run(branch, lambda: branch(x.movedim(0, 2), Grid(height, width), mean))
    feature_map = {"leakyrelu": "leaky_relu"}.get(config.get("kernel_func", "identity"), config.get("kernel_func"))
    layer = linsight.create_attention(
        "inline",
        dim,
        num_heads,
        qkv_bias=config["qkv_bias"],
        projections="q_kv" if config["host"] == "pvt" else "qkv",
        feature_map=feature_map or "identity",
    )
    grid = Grid(height, width, x.shape[1] - height * width)
    return Run(layer, lambda: layer(x, grid))


BUILDERS = {"inline_op": inline_op}
