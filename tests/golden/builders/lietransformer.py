"""A block of the LieTransformer."""

from typing import Any

import torch

from golden.spec import Run, tensor
from linsight.models.points import LieBlock

KERNELS = {"mlp": "mlp", "relative_position": "relative"}
WEIGHTS = {"softmax": "softmax", "norm_exp": "exp", "dot_product": "mean"}


def block(spec: dict[str, Any]) -> Run:
    """The last five points of the second image are padding."""
    config, inputs = spec["config"], spec["inputs"]
    elements, x = (tensor(inputs[name]["shape"], name) for name in ("element", "feats"))
    keep = torch.ones(x.shape[:2], dtype=torch.bool)
    keep[1, -5:] = False
    model = LieBlock(
        config["dim"],
        config["num_heads"],
        group=config["group"],
        axes=elements.shape[2],
        kernel=KERNELS[config["kernel_type"]],
        weights=WEIGHTS[config["attention_fn"]],
        kernel_dim=config["kernel_dim"],
    )
    return Run(model, lambda: model(elements, x, keep), renames=LieBlock.published)


BUILDERS = {"lie_block_": block}
