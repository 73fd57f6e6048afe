"""Nexus: the layer on tokens without a grid."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def layer(spec: dict[str, Any]) -> Run:
    """The layer of the order that is configured."""
    config, x = spec["config"], tensor(spec["input_shape"])
    made = linsight.create_attention("nexus", config["dim"], config["num_heads"], order=config["order"])
    return Run(made, lambda: made(x, Grid(1, x.shape[1])))


BUILDERS = {"nexus_op": layer}
