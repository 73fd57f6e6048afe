"""Feature maps: elementwise functions of queries and keys, by name."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 for x >= 0, exp(x) otherwise: the sum of exp(x - relu(x)) and relu(x).

    Not `elu(x) + 1`, which in bfloat16 rounds to 0 below about -6. No branch overflows, so no gradient becomes NaN.
    Not `clamp` either, which would have a gradient of 0 at 0, where zero weights start.
    """
    above = F.relu(x)
    return above + (x - above).exp()


def gentle_exp(x: Tensor) -> Tensor:
    """exp(0.2 x), the exponential map of InLine's Swin host."""
    return torch.exp(0.2 * x)


def positive(x: Tensor) -> Tensor:
    """relu(x) + 1e-6, whose powers never vanish."""
    return F.relu(x) + 1e-6


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "relu": F.relu,
    "positive": positive,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "elu+1": elu_plus_one,
    "exp": gentle_exp,
}
