"""Halo attention: timm's layer on a map."""

import re
from typing import Any

from torch import nn

import linsight
from golden.spec import Run, on_map


def layer(spec: dict[str, Any]) -> Run:
    """The layer; its name tells blocks and halo, its tables the width of a head."""
    shapes = dict(spec["state_dict"])
    rows, width = shapes["pos_embed.height_rel"]
    block, halo = map(int, re.search(r"_b(\d+)_h(\d+)", spec["name"]).groups())
    assert rows == 2 * (block + 2 * halo) - 1
    shape = spec["inputs"]["input"]["shape"]
    made = linsight.create_attention(
        "halo", shape[1], shape[1] // width, block_size=block, halo_size=halo, qkv_bias=False
    )
    made.proj = nn.Identity()
    return Run(made, on_map(made, {"input_shape": shape}))


BUILDERS = {"halo": layer}
