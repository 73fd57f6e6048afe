"""Hedgehog without projections, and its feature maps alone."""

from typing import Any

from golden.spec import Run, tensor
from linsight import Grid, Layout
from linsight.attention import Rename, Tokens, create_core, split_heads


def heads(spec: dict[str, Any]) -> int:
    """The weights tell the width of a head."""
    return int(spec["input_shape"][2] // spec["state_dict"][0][1][-1])


def hedgehog_attn(spec: dict[str, Any]) -> Run:
    """q, k and v as inputs."""
    q, k, v = (split_heads(tensor(spec["inputs"][name], name), heads(spec)) for name in "qkv")
    core = create_core("hedgehog", spec["inputs"]["v"][2], heads(spec), causal=spec["causal"])
    layout = Layout(Grid(1, q.shape[1]))
    renames = (Rename("feature_map_", "map_"),)
    return Run(core, lambda: core(Tokens(q, k, v), layout).flatten(2), renames)


def feature_map(spec: dict[str, Any]) -> Run:
    """The features `(B, heads, N, 2f)` of an input."""
    x = split_heads(tensor(spec["input_shape"]), heads(spec))
    kind = "softmax"
    if "lolcats" in spec["name"]:
        kind = "exp_parts" if "exp_dim" in spec["name"] else "softmax_parts"
    core = create_core("hedgehog", spec["input_shape"][2], heads(spec), feature_map=kind)
    module = core.map_q
    return Run(module, lambda: module(x).transpose(1, 2), (Rename("feature_map.", ""), Rename("fm.mlp.layer", "heads")))


BUILDERS = {"hedgehog_attn": hedgehog_attn, "hedgehog_fla": feature_map, "hedgehog_lolcats": feature_map}
