"""Attention in windows of voxels."""

import math
from typing import Any

import torch

from golden.spec import Run, tensor
from linsight.models.points import VoxelAttention

SIGNALS = {"XYZ_RGB": ("xyz", "rgb"), "XYZ_RGB_NORM": ("xyz", "rgb", "norm")}


def attention(spec: dict[str, Any]) -> Run:
    """Sorted voxels lie in windows one after the other; those of the case are in the reverse order."""
    config, inputs = spec["config"], spec["inputs"]
    x, drawn = (tensor(inputs[name]["shape"], name) for name in ("feats", "coords"))
    place = (drawn[:, :3] / (2 * math.sqrt(3)) + 0.5).clamp(0, 0.999) * config["window_size"]
    signals = torch.cat([place, drawn[:, 3:] / math.sqrt(3) * 0.999], dim=1)
    windows = torch.arange(len(config["window_sizes"])).repeat_interleave(torch.tensor(config["window_sizes"]))
    layer = VoxelAttention(
        config["dim"],
        config["num_heads"],
        window_size=config["window_size"],
        quant_size=config["quant_size"],
        signals=SIGNALS[config["cRSE"]],
    )
    return Run(layer, lambda: layer(x, signals.flip(0), windows.flip(0)))


BUILDERS = {"swin3d_attn_": attention}
