"""CLEAR in the attention of FLUX, in double and in single blocks, by our processor for diffusers."""

from typing import Any

import torch
from torch import Tensor, nn

from golden.spec import Run, tensor
from linsight.convert import Mixing
from linsight.convert.place import Place
from linsight.convert.seams.diffusers_processors import Flux

TRAINED = 64**2 + 512  # keys of FLUX.1 at 1024 x 1024 pixels


class FluxAttention(nn.Module):
    """What a processor sees of the class of this name in diffusers."""

    def __init__(self, dim: int, heads: int, *, double: bool) -> None:
        super().__init__()
        self.heads = heads
        linear = ["to_q", "to_k", "to_v"] + ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] * double
        for name in linear:
            self.add_module(name, nn.Linear(dim, dim))
        for name in ["norm_q", "norm_k"] + ["norm_added_q", "norm_added_k"] * double:
            self.add_module(name, nn.RMSNorm(dim // heads, eps=1e-6))
        if double:
            self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))


def rotary(height: int, width: int, text: int, theta: float, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(text + height * width, sum of axes)` of places (0, row, column), text at (0, 0, 0)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros(height * width), rows.flatten(), columns.flatten()], dim=1).double()
    places = torch.cat([torch.zeros(text, 3).double(), places])
    angles = [
        torch.outer(place, theta ** (-torch.arange(0, size, 2).double() / size))
        for place, size in zip(places.unbind(1), axes, strict=True)
    ]
    whole = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return whole.cos().float(), whole.sin().float()


def attention(spec: dict[str, Any]) -> Run:
    """Text and image apart in a double block, together in a single one."""
    config, double = spec["config"], spec["config"]["double_stream"]
    dim, heads, grid = config["dim"], config["heads"], (config["height"], config["width"])
    mixing = Mixing(
        "clear",
        dim,
        heads,
        radius=config["window_size"],
        down_factor=config["down_factor"],
        proportional=TRAINED if config["proportional_attention"] else 0,
    )
    processor = Flux(mixing, Place(grid))
    attn, rope = FluxAttention(dim, heads, double=double), config["rope"]
    places = rope and rotary(*grid, config["text_length"], rope["theta"], rope["axes_dim"])
    given = {entry["name"]: tensor(entry["shape"], entry["name"]) for entry in spec["inputs"]}

    def call() -> dict[str, Tensor]:
        out = processor(attn, given["input"], given.get("text"), None, places)
        return dict(zip(("image", "text"), out, strict=True)) if double else {"output": out}

    both = nn.ModuleDict({"attn": attn, "proc": processor})
    return Run(both, call)


BUILDERS = {"clear_": attention}
