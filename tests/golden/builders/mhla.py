"""MHLA's layer, on tokens in the order of their blocks."""

import re
from typing import Any

from torch import Tensor

import linsight
from golden.spec import Run, tensor
from linsight import Grid


def mhla_op(spec: dict[str, Any]) -> Run:
    """The layer on `(B, block, token in block, C)`."""
    x, (height, width) = tensor(spec["input_shape"]), spec["grid"]
    _, blocks, _, dim = x.shape
    side, piece = round(blocks**0.5), spec.get("piece") or round(x.shape[2] ** 0.5)
    named = re.search(r"d\d+h(\d+)", spec["name"])  # heads are not told apart from places in the trace
    assert named
    layer = linsight.create_attention(
        "mhla",
        dim,
        int(named[1]),
        blocks=blocks,
        denominator="published",
        transform=spec.get("transform", "linear"),
        qk_norm=any(key == "q_norm.weight" for key, _ in spec["state_dict"]),
        qkv_bias=False,
    )

    def turned(x: Tensor, *sizes: int) -> Tensor:
        return x.reshape(x.shape[0], *sizes, dim).transpose(2, 3)

    def call() -> Tensor:
        tokens = turned(x, side, side, piece, piece).reshape(-1, height * width, dim)
        return turned(layer(tokens, Grid(height, width)), side, piece, side, piece).reshape(x.shape)

    return Run(layer, call)


BUILDERS = {"mhla_op": mhla_op}
