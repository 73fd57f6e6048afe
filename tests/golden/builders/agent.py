"""Agent attention in each of its hosts."""

from typing import Any

import linsight
from golden.spec import REDUCTION, Run, heads, tensor
from linsight import Grid
from linsight.attention import create_core
from linsight.models.hosts.cswin import Branch, inner


def agent_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens."""
    config, x, (height, width) = spec["config"], tensor(spec["input_shape"]), spec["config"]["grid"]
    prefix = x.shape[1] - height * width
    layer = linsight.create_attention(
        "agent",
        config["dim"],
        heads(spec),
        agents=config["agent_num"],
        prefix_bias=prefix > 0,
        grid=(height, width),
        qkv_bias=config["qkv_bias"],
        reduction=config.get("sr_ratio", 1),
        projections="q_kv" if "sr_ratio" in config else "qkv",
    )
    return Run(layer, lambda: layer(x, Grid(height, width, prefix)), REDUCTION)


def agent_branch(spec: dict[str, Any]) -> Run:
    """CSwin's attention, which has no projections and its own convolution, on the whole grid or on stripes."""
    config, qkv = spec["config"], tensor(spec["input_shape"])
    grid, index = Grid(*config["grid"]), config["idx"]
    split = config["split_size"]
    sizes = None if index < 0 else [(None, split), (split, None)][index]
    place = inner(sizes, grid[:2])
    core = create_core("agent", config["dim"], heads(spec), agents=config["agent_num"], local=False, grid=place)
    branch = Branch(core, config["dim"], sizes=sizes)
    return Run(branch, lambda: branch(qkv.movedim(0, 2), grid, qkv[0]))


BUILDERS = {"op_agent": agent_op, "op_agent_cswin": agent_branch}
