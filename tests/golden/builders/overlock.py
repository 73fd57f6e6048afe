"""OverLoCK's blocks on maps, and the convolution whose branches are merged."""

from typing import Any

import torch

from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention import Rename, create_block
from linsight.attention.parts.context import RepConv
from linsight.models.hosts.overlock import FocusBlock


def contmix(spec: dict[str, Any]) -> Run:
    """The stand-alone block, with gradients of its input."""
    told, x = spec["config"], tensor(spec["input_shape"]).requires_grad_("gradients" in spec)
    size, scaled = x.shape[2:], "ls1.weight" in dict(spec["state_dict"])
    options = {key: told[key] for key in ("kernel_size", "smk_size", "res_scale", "mlp_ratio")}
    options["ls_init_value"] = 1.0 if scaled else None
    block = create_block("contmix", told["dim"], told["num_heads"], **options)

    def call():
        return block(x.flatten(2).transpose(1, 2), Grid(*size)).transpose(1, 2).unflatten(2, size)

    return Run(block, call, inputs={"input": x})


def focus(spec: dict[str, Any]) -> Run:
    """A block of the closer look; the last one of a model gives map and context as one."""
    told, given = spec["config"], spec["inputs"]
    maps = {name: tensor(given[name]["shape"], name) for name in given}
    size, first = maps["x"].shape[2:], "x_scale.weight" not in dict(spec["state_dict"])
    tokens = {name: map_.flatten(2).transpose(1, 2) for name, map_ in maps.items()}
    options = {"mlp_ratio": told["mlp_ratio"], "first": first}
    block = FocusBlock(told["dim"], told["ctx_dim"] // 4, told["num_heads"], told["kernel_size"], **options)

    def call():
        outs = block(tokens["x"], tokens["h_x"], tokens.get("h_r", tokens["h_x"]), Grid(*size))
        x, h = (out.transpose(1, 2).unflatten(2, size) for out in outs)
        if spec["output_shape"][1] > told["dim"]:
            return torch.cat([x, h], dim=1)
        return {"output": x, "context": h}

    return Run(block, call)


def merged(spec: dict[str, Any]) -> Run:
    """The convolution and the one that it is merged to."""
    x = tensor(spec["input_shape"])
    size = x.shape[2:]
    conv = RepConv(spec["config"]["dim"], spec["config"]["kernel_size"])

    def call():
        out = conv(x.flatten(2).transpose(1, 2), size).transpose(1, 2).unflatten(2, size)
        weight, bias = conv.merged()
        return {"output": out, "merged_weight": weight, "merged_bias": bias}

    return Run(conv, call, (Rename("rep.", ""),))


BUILDERS = {"dynconv_block": focus, "contmix_block": contmix, "rep_merge": merged}
