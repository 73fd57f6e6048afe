"""Visual-contrast attention: the card's own numbers, as no official code was to be had."""

from typing import Any

import linsight
from golden.spec import Run, heads, tensor
from linsight import Grid


def vca_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens, as that of the block `block_depth`."""
    config, x = spec["config"], tensor(spec["input_shape"])
    layer = linsight.create_attention(
        "vca", config["dim"], heads(spec), contrast_tokens=config["contrast_tokens"], index=config["block_depth"]
    )
    grid = Grid(*config["grid"], config["prefix_tokens"])
    return Run(layer, lambda: layer(x, grid))


BUILDERS = {"vca_op": vca_op}
