"""L2ViT's attention on tokens, and its global block."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention import Rename, create_block


def l2vit_op(spec: dict[str, Any]) -> Run:
    """The layer; its temperatures tell the heads."""
    x = tensor(spec["input_shape"])
    layer = linsight.create_attention("l2vit", x.shape[2], dict(spec["state_dict"])["temperature"][0])
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


def l2vit_block(spec: dict[str, Any]) -> Run:
    """The block; the name of the case tells the grid."""
    x, shapes = tensor(spec["input_shape"]), dict(spec["state_dict"])
    grid = Grid(*map(int, spec["name"].rpartition("_")[2].split("x")))
    ratio = shapes["block.mlp.fc1.weight"][0] / x.shape[2]
    block = create_block("l2vit_block", x.shape[2], shapes["block.attn.temperature"][0], mlp_ratio=ratio)
    return Run(block, lambda: block(x, grid), (Rename("block.", ""),))


BUILDERS = {"l2vit_op": l2vit_op, "l2vit_block": l2vit_block}
