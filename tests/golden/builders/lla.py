"""Local linear attention without projections, causal as published."""

from typing import Any

from golden.spec import Run, heads, tensor
from linsight import Grid, Layout
from linsight.attention import Tokens, create_core, split_heads


def lla_op(spec: dict[str, Any]) -> Run:
    """q, k and v as inputs, heads merged."""
    q, k, v = (split_heads(tensor(spec["inputs"][name], name), heads(spec)) for name in "qkv")
    core = create_core("lla", spec["inputs"]["v"][2], heads(spec), ridge=spec["ridge_lambda"], causal=True)
    return Run(core, lambda: core(Tokens(q, k, v), Layout(Grid(1, q.shape[1]))).flatten(2))


BUILDERS = {"lla_op": lla_op}
