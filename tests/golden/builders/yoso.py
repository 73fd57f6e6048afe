"""YOSO's expectation without projections."""

import re
from typing import Any

from golden.spec import Run, tensor
from linsight import Grid, Layout
from linsight.attention import Tokens, create_core


def yoso_e(spec: dict[str, Any]) -> Run:
    """On q, k and v `(B, heads, N, D)`; the name tells the bits."""
    q, k, v = (tensor(spec["inputs"][name]["shape"], name).transpose(1, 2) for name in "qkv")
    bits = re.search(r"_t(\d+)", spec["name"])
    assert bits
    core = create_core("yoso", v[0, 0].numel(), v.shape[2], form="expectation", bits=int(bits[1]))
    return Run(core, lambda: core(Tokens(q, k, v), Layout(Grid(1, q.shape[1]))).transpose(1, 2))


BUILDERS = {"yoso_e": yoso_e}
