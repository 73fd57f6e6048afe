"""MLLA: the bare mechanism, its rotary embedding, its block and what is between stages."""

from typing import Any

from torch import Tensor, nn

from golden.spec import Run, heads, tensor
from linsight import Grid
from linsight.attention import Attention, create_core
from linsight.models.hosts.mlla import MLLATransformer
from linsight.models.parts.conv_pyramid import ConvMerge
from linsight.ops import Tile, rotate


def op_mlla_attn(spec: dict[str, Any]) -> Run:
    """The core behind its projection: no gate and nothing after it."""
    config, x = spec["config"], tensor(spec["input_shape"])
    layer = Attention(create_core("mlla", config["dim"], heads(spec)), config["dim"])
    layer.proj = nn.Identity()
    return Run(layer, lambda: layer(x, Grid(*config["grid"])))


def op_mlla_rope(spec: dict[str, Any]) -> Run:
    """The rotary embedding alone, of a map."""
    x = tensor(spec["input_shape"])
    tile = Tile.whole(Grid(*x.shape[1:3]))

    def call() -> Tensor:
        return rotate(x.flatten(1, 2), tile).unflatten(1, x.shape[1:3])

    return Run(nn.Identity(), call)


def block_mlla(spec: dict[str, Any]) -> Run:
    """A block, out of a model of one stage."""
    config, x = spec["config"], tensor(spec["input_shape"])
    hidden = dict(map(tuple, spec["state_dict"]))["mlp.fc1.weight"][0]
    model = MLLATransformer(stages=[(config["dim"], 1, heads(spec), hidden / config["dim"])], attention="mlla")
    block = model.stages[0].blocks[0]
    return Run(block, lambda: block(x, Grid(*config["grid"])))


def merge_mlla(spec: dict[str, Any]) -> Run:
    """The three convolutions between stages."""
    config, x = spec["config"], tensor(spec["input_shape"])
    merge = ConvMerge(config["dim"], spec["output_shape"][-1])
    return Run(merge, lambda: merge(x.transpose(1, 2).unflatten(2, config["grid"]))[0])


BUILDERS = {
    "op_mlla_attn": op_mlla_attn,
    "op_mlla_rope": op_mlla_rope,
    "block_mlla": block_mlla,
    "merge_mlla": merge_mlla,
}
