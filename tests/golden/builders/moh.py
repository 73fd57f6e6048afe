"""MoH's layers: those of its vision models, told by their configuration, and those of its diffusion transformers."""

from typing import Any

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention import collect_losses


def gates(config: dict[str, Any]) -> dict[str, int]:
    """The options of the gates."""
    return {"shared_heads": config["shared_head"], "routed_heads": config["routed_head"]}


def transnext(spec: dict[str, Any]) -> Run:
    """The layer on tokens; with gradients in training mode, and then its loss is an output, too."""
    config, learns = spec["config"], "gradients" in spec
    x = tensor(spec["input_shape"]).requires_grad_(learns)
    layer = linsight.create_attention(
        "transnext",
        config["dim"],
        config["num_heads"],
        sr_ratio=config.get("sr_ratio", 1),
        grid=tuple(config["grid"]),
        **gates(config),
    )

    def call() -> Any:
        layer.train(learns)
        with collect_losses() as own:
            out = layer(x, Grid(*config["grid"]))
        return {"output": out, "balance": own.told[0][1][None]} if learns else out

    return Run(layer, call, (), {"input": x})


def diffusion(spec: dict[str, Any]) -> Run:
    """The layer on tokens without a grid."""
    config, x = spec["config"], tensor(spec["input_shape"])
    layer = linsight.create_attention(
        "moh", config["dim"], config["num_heads"], head_dim=config["head_dim"], **gates(config)
    )
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


BUILDERS = {"moh_attention": transnext, "moh_aggregated": transnext, "moh_dit_attention": diffusion}
