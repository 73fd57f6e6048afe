"""LLN without projections."""

import re
from typing import Any

from golden.spec import Run, tensor
from linsight import Grid, Layout
from linsight.attention import Tokens, create_core, split_heads


def lln_op(spec: dict[str, Any]) -> Run:
    """q, k and v as inputs; the names tell heads and eps."""
    heads, eps = (
        re.search(pattern, spec[where])
        for pattern, where in ((r"d\d+h(\d+)", "name"), (r"eps ([\d.e-]+\d)", "operator"))
    )
    assert heads and eps
    q, k, v = (split_heads(tensor(spec["inputs"][name], name), int(heads[1])) for name in "qkv")
    core = create_core("lln", spec["inputs"]["v"][2], int(heads[1]), statistics="batch", eps=float(eps[1]))
    return Run(core, lambda: core(Tokens(q, k, v), Layout(Grid(1, q.shape[1]))).flatten(2))


BUILDERS = {"lln_op": lln_op}
