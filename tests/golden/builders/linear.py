"""Linear attention without projections."""

from typing import Any

from golden.spec import Run, heads, tensor
from linsight import Grid, Layout
from linsight.attention import Tokens, mechanism, split_heads


def linear_op(spec: dict[str, Any]) -> Run:
    """q, k and v as inputs, no projections."""
    q, k, v = (split_heads(tensor(spec["inputs"][name], name), heads(spec)) for name in "qkv")
    core = mechanism("linear").factory(spec["inputs"]["v"][2], heads(spec), causal=spec["causal"])
    layout = Layout(Grid(1, q.shape[1]))
    return Run(core, lambda: core(Tokens(q, k, v), layout).flatten(2))


BUILDERS = {"linear_op": linear_op}
