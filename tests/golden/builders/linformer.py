"""Linformer without projections."""

from typing import Any

from golden.spec import Run, tensor
from linsight import Grid, Layout
from linsight.attention import Rename, Tokens, create_core


def linformer_op(spec: dict[str, Any]) -> Run:
    """On q, k and v `(B, heads, N, D)`; E lies on one row."""
    q, k, v = (tensor(spec["inputs"][name]["shape"], name).transpose(1, 2) for name in "qkv")
    ((_, (heads, rank, places)),) = spec["state_dict"]
    core = create_core("linformer", heads * v.shape[3], heads, rank=rank, grid=(1, places))
    return Run(core, lambda: core(Tokens(q, k, v), Layout(Grid(1, places))).transpose(1, 2), (Rename("a.", ""),))


BUILDERS = {"linformer_": linformer_op}
