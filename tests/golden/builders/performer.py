"""Performer without projections; its random features are given."""

from typing import Any

from golden.spec import Run, tensor
from linsight import Grid, Layout
from linsight.attention import Tokens, create_core, split_heads


def performer_op(spec: dict[str, Any]) -> Run:
    """q, k and v as inputs; the features tell the width of a head."""
    ((_, (count, width)),) = spec["state_dict"]
    dim = spec["inputs"]["v"][2]
    q, k, v = (split_heads(tensor(spec["inputs"][name], name), dim // width) for name in "qkv")
    kernel = "relu" if spec["name"].endswith("relu") else "softmax"
    core = create_core("performer", dim, dim // width, features=count, kernel=kernel)
    layout = Layout(Grid(1, q.shape[1]))
    return Run(core, lambda: core(Tokens(q, k, v), layout).flatten(2))


BUILDERS = {"performer_op": performer_op}
