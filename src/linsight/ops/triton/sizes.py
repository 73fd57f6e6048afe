"""How much a program of the elementwise kernels holds, and in which dtype it sums."""

import torch
import triton.language as tl
from torch import Tensor

ACCUMULATORS = {torch.float32: tl.float32, torch.float64: tl.float64}
INTERPRETED = 1 << 15


def numbers(x: Tensor, on_gpu: int) -> int:
    """How many a program is to hold at once: `on_gpu`; more in the interpreter, whose operations all cost the same."""
    return INTERPRETED if x.device.type == "cpu" else on_gpu
