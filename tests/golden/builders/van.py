"""VAN's large kernel attention on a map: the operator, and the module with projections and its own residual."""

from typing import Any

import linsight
from golden.spec import Run, on_map, tensor
from linsight import Grid
from linsight.attention import Rename, Tokens, create_core
from linsight.ops import Layout


def attention(spec: dict[str, Any]) -> Run:
    """The layer."""
    shape = spec["inputs"]["input"]["shape"]
    layer = linsight.create_attention("lka", shape[1], 1)
    return Run(layer, on_map(layer, {"input_shape": shape}))


def operator(spec: dict[str, Any]) -> Run:
    """The core, of which tokens are values."""
    x = tensor(spec["inputs"]["input"]["shape"])
    core = create_core("lka", x.shape[1], 1)
    tokens = x.flatten(2).transpose(1, 2)[:, :, None]

    def call():
        return core(Tokens(tokens, tokens, tokens), Layout(Grid(*x.shape[2:]))).flatten(2).transpose(1, 2).view_as(x)

    return Run(core, call, (Rename("", "spatial_gating_unit."),))


BUILDERS = {"lka_attention": attention, "lka_d": operator}
