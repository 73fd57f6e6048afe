"""FLARE's layer, and its block."""

import re
from typing import Any

from torch import Tensor, nn

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention.mechanisms.flare import ResidualMLP


def made(spec: dict[str, Any]) -> nn.Module:
    """The layer of a case: heads are in its name, the rest in its state."""
    shapes = {key.removeprefix("att."): shape for key, shape in spec["state_dict"]}
    named = re.search(r"_h(\d+)", spec["name"])
    assert named
    dim, latents = shapes["latent_q"]
    norm = "none" if "q_norm.weight" not in shapes else "layer" if "q_norm.bias" in shapes else "rms"
    depth = (
        -1 if "k_proj.fc.weight" in shapes else len({key for key in shapes if re.match(r"k_proj\.fcs.*weight", key)})
    )
    return linsight.create_attention("flare", dim, int(named[1]), latents=latents, depth=depth, norm=norm)


class Block(nn.Module):
    """x + att(LN x), x + mlp(LN x)."""

    def __init__(self, att: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.att = nn.LayerNorm(dim), nn.LayerNorm(dim), att
        self.mlp = ResidualMLP(dim, dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x), Grid(1, x.shape[1]))
        return x + self.mlp(self.norm2(x))


def flare_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens."""
    x, layer = tensor(spec["inputs"]["input"]["shape"]), made(spec)
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


def flare_block(spec: dict[str, Any]) -> Run:
    """The block on tokens."""
    x = tensor(spec["inputs"]["input"]["shape"])
    block = Block(made(spec), x.shape[2])
    return Run(block, lambda: block(x))


BUILDERS = {"flare_d": flare_op, "flare_block": flare_block}
