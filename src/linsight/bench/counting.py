"""Parameters and operations, counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from linsight.fuse import fused


def count_flops(step: Callable[[], Any]) -> int:
    """Count the operations of a step's matrix products and convolutions; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def count_parameters(module: nn.Module) -> int:
    """How many numbers of `module` training changes; of a frozen one, as `fuse` makes them, all parameters."""
    learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return learned or sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of one forward's matrix products and convolutions; on the meta device nothing is computed.

    A second forward is counted: what layers keep from image to image, as biases of a grid, is made in the first one.
    """
    with torch.no_grad():
        module = fused(module)
        module(*inputs)
        return count_flops(lambda: module(*inputs)) // 2
