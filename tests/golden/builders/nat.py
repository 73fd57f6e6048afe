"""Neighbourhood attention: the published layer, and the operator without projections or bias."""

import ast
import re
from typing import Any

from torch import nn

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention import Tokens, create_core
from linsight.ops import AxisWindow, Layout, neighbourhood_attention_nd


def layer(spec: dict[str, Any]) -> Run:
    """The layer on a map `(B, H, W, C)`; the table tells the kernel and the heads."""
    x, shapes = tensor(spec["inputs"]["input"]["shape"]), dict(spec["state_dict"])
    heads, height, width = shapes["rpb"]
    dilation = re.search(r"dil(\d+)", spec["name"])
    made = linsight.create_attention(
        "nat",
        x.shape[-1],
        heads,
        kernel_size=((height + 1) // 2, (width + 1) // 2),
        dilation=int(dilation[1]) if dilation else 1,
    )
    return Run(made, lambda: made(x.flatten(1, 2), Grid(*x.shape[1:3])).view_as(x))


def core(spec: dict[str, Any]) -> Run:
    """The core on `(B, H, W, heads, D)` or `(B, N, heads, D)`; the note tells its options, in the published words."""
    q, k, v = (tensor(spec["inputs"][name]["shape"], name) for name in "qkv")
    *sides, heads, width = q.shape[1:]
    told = re.search(r"\{.*\}", spec["note"])
    options = ast.literal_eval(told[0]) if told else {"kernel_size": int(spec["note"].rpartition("kernel ")[2])}
    if len(sides) == 1:
        options = {name: (False if name == "is_causal" else 1, value) for name, value in options.items()}
    made = create_core("nat", heads * width, heads, rpb=False, **options)
    tokens = Tokens(*(x.flatten(1, -3) for x in (q, k, v)))
    return Run(made, lambda: made(tokens, Layout(Grid(*[1, *sides][-2:]))).view_as(q))


def volume(spec: dict[str, Any]) -> Run:
    """The operator on `(B, T, H, W, heads, D)`, which no layer is made of."""
    q, k, v = (tensor(spec["inputs"][name]["shape"], name) for name in "qkv")
    told = re.search(r"\{.*\}", spec["note"])
    options = ast.literal_eval(told[0]) if told else {"kernel_size": int(spec["note"].rpartition("kernel ")[2])}
    axes = q.ndim - 3
    each = {name: value if isinstance(value, tuple) else (value,) * axes for name, value in options.items()}
    names = {"kernel_size": "kernel", "is_causal": "causal"}
    windows = [AxisWindow(**{names.get(name, name): value[i] for name, value in each.items()}) for i in range(axes)]
    return Run(nn.Identity(), lambda: neighbourhood_attention_nd(q, k, v, windows))


BUILDERS = {"na1d": core, "na2d": core, "na2d_rpb": layer, "na3d": volume}
