"""The RAVLT-linear host: RAVLT as PolaFormer++ (arXiv 2501.15061) has it, 1x1 convolutions in blocks as linear layers.

It computes what RAVLT does. A stage there has two rotations, of one and of two widths of a head, of which its blocks
read one: the other is carried along, for checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linsight.attention import Rename

from ..parts.stages import StageSize
from ..registry import add_hosts
from ..rows import FOUR_MAPS, Host
from .ravlt import RAVLT, RAVLTBlock, RAVLTStage


class LinearBlock(RAVLTBlock):
    """The block, with other shapes in checkpoints."""

    published = (
        *(rule._replace(ones=0) if rule.published.startswith("ffn.") else rule for rule in RAVLTBlock.published),
        *(Rename(name, name, ones=-1) for name in ("attn.qkvo.", "attn.proj.")),
    )


class CarriedAngles(nn.Module):
    """The angles of a rotation that checkpoints hold and nothing reads: 10000^(-t), t from 0 to 1, each twice."""

    angle: Tensor

    def __init__(self, count: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        angle = 1e4 ** -torch.linspace(0, 1, count // 2, device=device)
        self.register_buffer("angle", angle.repeat_interleave(2).to(dtype or torch.get_default_dtype()))


class TwiceRotatedStage(RAVLTStage):
    """A stage with two published rotations."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int, **factory: Any) -> None:
        super().__init__(downsample, blocks)
        self.in_copies = {}  # type: ignore[misc]  # of the class, where there is one rotation
        cores: list[Any] = [getattr(getattr(block, "attn", None), "core", None) for block in blocks]
        read = {len(core.angle): dim // core.num_heads for core in cores if hasattr(core, "angle")}
        for width in {*read.values()}:
            for name, count in (("RoPE", width // 2), ("RoPE_linear", width)):
                if count in read:
                    self.in_copies[f"{name}.angle"] = "blocks.{}.attn.core.angle"
                else:
                    self.add_module(name, CarriedAngles(count, **factory))


class RAVLTLinear(RAVLT):
    """The host; its arguments are those of `RAVLT`."""

    block_cls = LinearBlock

    def make_stage(
        self,
        downsample: nn.Module,
        blocks: list[nn.Module],
        dim: int,
        grid: tuple[int, int],
        *,
        last: bool,
        **factory: Any,
    ) -> nn.Module:
        """A stage of these parts."""
        return TwiceRotatedStage(downsample, blocks, dim, **factory)


_CFG = {"first_conv": "stages.0.downsample.convs.0.conv", "classifier": "head.fc"}
# Widths, depths, heads, and what the scales of branches begin with.
_SIZES: dict[str, tuple[Any, ...]] = {
    "b0": ((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), 1.0),
    "b1": ((32, 64, 192, 384), (2, 2, 4, 2), (1, 2, 6, 12), 1.0),
    "b2": ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 1.0),
    "b3": ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 1.0),
    "b4": ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), (1.0, 1.0, 1e-6, 1e-6)),
    "b5": ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 1e-6),
}


def _host(size: str, dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], init_values: Any) -> Host:
    stages = tuple(StageSize(*row, 3.5) for row in zip(dims, depths, heads, strict=True))
    return Host(
        f"ravlt_linear_{size}",
        RAVLTLinear,
        {"stages": stages, "init_values": init_values, "projection": 2560 if size == "b5" else 2048},
        _CFG,
        FOUR_MAPS,
    )


add_hosts(*(_host(size, *row) for size, row in _SIZES.items()))
