"""Circulant attention, alone and in the block of its host."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def op_circulant(spec: dict[str, Any]) -> Run:
    """The layer on tokens; heads have no effect."""
    config, x = spec["config"], tensor(spec["input_shape"])
    layer = linsight.create_attention("circulant", config["dim"], 1)
    return Run(layer, lambda: layer(x, Grid(*config["grid"])))


def block_circulant(spec: dict[str, Any]) -> Run:
    """A block, out of a model of one."""
    config, x = spec["config"], tensor(spec["input_shape"])
    dim, hidden = config["dim"], dict(spec["state_dict"])["mlp.fc1.weight"][0]
    sizes = {"embed_dim": dim, "depth": 1, "num_heads": 1, "mlp_ratio": hidden / dim}
    block = linsight.create_model("ca_deit_tiny", **sizes).blocks[0]
    return Run(block, lambda: block(x, Grid(*config["grid"])))


BUILDERS = {"op_circulant": op_circulant, "block_circulant": block_circulant}
