"""Two coupled residual streams in a block of DeiT."""

from typing import Any

from golden.spec import Run, heads, tensor
from linsight import Grid
from linsight.models.hosts.vit import VisionTransformer
from linsight.models.parts.siamese import Pair


def block(spec: dict[str, Any]) -> Run:
    """The block `index` of a model; its output is both streams."""
    config, inputs = spec["config"], spec["inputs"]
    x, y = (tensor(inputs[name]["shape"], name) for name in "xy")
    model = VisionTransformer(
        embed_dim=config["dim"],
        num_heads=heads(spec),
        mlp_ratio=config["mlp_ratio"],
        depth=config["index"] + 1,
        norm="siamese",
    )
    last = model.blocks[config["index"]]

    def call() -> Any:
        pair = last(Pair(x, y), Grid(1, x.shape[1]))
        return {"output": pair.x, "output_y": pair.y}

    return Run(last, call)


BUILDERS = {"siamese_deit_block": block}
