"""Blocks of the hosts, with each mechanism that was published in them."""

from typing import Any

import linsight
from golden.spec import REDUCTION, Run, heads, tensor
from linsight import Grid
from linsight.attention import Rename
from linsight.models.hosts.cswin import CSwinTransformer
from linsight.models.hosts.pvt_v2 import PyramidVisionTransformerV2
from linsight.models.hosts.swin import SwinTransformer


def softmax_op(spec: dict[str, Any]) -> Run:
    """PVT's attention with spatial reduction."""
    config, x = spec["config"], tensor(spec["input_shape"])
    layer = linsight.create_attention("softmax", config["dim"], heads(spec), reduction=config["sr_ratio"])
    return Run(layer, lambda: layer(x, Grid(*config["grid"])), REDUCTION)


def block(spec: dict[str, Any]) -> Run:
    """A block of a host, out of a model of one stage."""
    config, x = spec["config"], tensor(spec["input_shape"])
    dim, num_heads, grid = config["dim"], heads(spec), Grid(*config["grid"])
    attention = next((name for name in ("inline", "focused") if name in spec["name"]), "softmax")
    hidden = dict(spec["state_dict"])["mlp.fc1.weight"][0]
    options = {}
    if attention == "focused":
        options = {"power": config["focusing_factor"], "kernel_size": config["kernel_size"]}
    shared = {"attention": attention, "attention_options": options, "img_size": (4 * grid.height, 4 * grid.width)}
    if config["host"] == "swin":
        window = config["window_size"]
        name = "window_size" if attention == "softmax" else "attention_window"
        model = SwinTransformer(embed_dim=dim, depths=[2], num_heads=[num_heads], **{name: window}, **shared)
        second = model.layers[0].blocks[1]  # the shifted one
        assert max(second.shift) == config["shift_size"]
        return Run(second, lambda: second(x, grid))
    if config["host"] == "pvt_v2":
        model = PyramidVisionTransformerV2(
            depths=[1],
            embed_dims=[dim],
            num_heads=num_heads,
            mlp_ratios=hidden / dim,
            **({"sr_ratios": config["sr_ratio"]} if attention == "softmax" else {}),
            **shared,
        )
        first = model.stages[0].blocks[0]
        sr = tuple(Rename(f"attn.{r.published}", f"attn.{r.ours}") for r in REDUCTION)
        return Run(first, lambda: first(x, grid), (Rename("mlp.dwconv.dwconv.", "mlp.dwconv."), *sr))
    # Not the last stage, which has no stripes.
    stages = [(dim, 1, num_heads, hidden / dim, config["split_size"])] * 2
    model = CSwinTransformer(stages=stages, **shared)
    first = model.stages[0].blocks[0]
    return Run(first, lambda: first(x, grid))


BUILDERS = {
    "inline_block": block,
    "lepe_block": block,
    "softmax_block": block,
    "focused_block": block,
    "block_pvt": block,
    "softmax_op": softmax_op,
}
