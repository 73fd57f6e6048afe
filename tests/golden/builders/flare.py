"""FLARE's layer, its block, and a model of these for points, which have no grid."""

import re
from typing import Any

from torch import Tensor, nn

import linsight
from golden.spec import Run, tensor
from linsight import Grid
from linsight.attention.mechanisms.flare import ResidualMLP


def made(spec: dict[str, Any], path: str = "att.") -> nn.Module:
    """The layer of a case, or the one at `path`: heads are in its name, the rest in its state."""
    shapes = {key.removeprefix(path): shape for key, shape in spec["state_dict"]}
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


class Model(nn.Module):
    """Blocks between two deep projections, of points `(B, N, inputs)` to values `(B, N, outputs)`."""

    def __init__(self, blocks: list[Block], dim: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_proj = ResidualMLP(inputs, dim, dim, 2, residual=(False, True))
        self.blocks = nn.ModuleList(blocks)
        self.out_proj = nn.Sequential(nn.LayerNorm(dim), ResidualMLP(dim, dim, outputs, 2, residual=(True, False)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for block in self.blocks:
            x = block(x)
        return self.out_proj(x)


def flare_model(spec: dict[str, Any]) -> Run:
    """The model on points."""
    x, shapes = tensor(spec["inputs"]["input"]["shape"]), dict(spec["state_dict"])
    dim, inputs = shapes["in_proj.fc1.weight"]
    count = len({found[1] for key in shapes if (found := re.match(r"blocks\.(\d+)", key))})
    blocks = [Block(made(spec, f"blocks.{i}.att."), dim) for i in range(count)]
    model = Model(blocks, dim, inputs, shapes["out_proj.1.fc2.weight"][0])
    return Run(model, lambda: model(x))


def flare_op(spec: dict[str, Any]) -> Run:
    """The layer on tokens."""
    x, layer = tensor(spec["inputs"]["input"]["shape"]), made(spec)
    return Run(layer, lambda: layer(x, Grid(1, x.shape[1])))


def flare_block(spec: dict[str, Any]) -> Run:
    """The block on tokens."""
    x = tensor(spec["inputs"]["input"]["shape"])
    block = Block(made(spec), x.shape[2])
    return Run(block, lambda: block(x))


BUILDERS = {"flare_d": flare_op, "flare_block": flare_block, "flare_model": flare_model}
