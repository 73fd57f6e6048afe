"""Products of bfloat16 numbers added up in float32, on a CPU that multiplies them natively.

torch has no product of bfloat16 numbers with a float32 result: a processor adds up in float32, and rounds when it
writes. What that loses is a second product, less the first: both together are the sum to 16 digits of two.
"""

import functools

import torch
from torch import Tensor

from linsight.runtime.device import cpu_bf16


@functools.cache
def is_native() -> bool:
    """True where the processor has instructions for bfloat16; else torch emulates them, slowly."""
    return bool(cpu_bf16())


def outer_sum(k: Tensor, v: Tensor) -> Tensor:
    """sum_n k_n v_n^T in float32 of bfloat16 `k` `(B, N, D)` and `v` `(B, N, E)`: `(B, D, E)`."""
    rounded = torch.bmm(k.mT, v)
    lost = torch.baddbmm(rounded, k.mT, v, beta=-1)
    return rounded.float() + lost.float()
