# mypy: allow-untyped-defs, allow-incomplete-defs
"""The feature maps of `linsight.ops.maps` as Triton functions, each with its derivative.

A new map is two functions here and a row of `MAPS`; the kernels take them as compile-time arguments.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def identity(x):
    """x."""
    return x


@triton.jit
def identity_slope(x):
    """1."""
    return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def relu(x):
    """max(x, 0), and NaN of NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def relu_slope(x):
    """1 above 0, else 0."""
    return tl.where(x > 0, 1.0, 0.0).to(x.dtype)


@triton.jit
def positive(x):
    """relu(x) + 1e-6."""
    return tl.where(x < 0, 0.0, x) + 1e-6


@triton.jit
def leaky_relu(x):
    """x above 0, else 0.01 x."""
    return tl.where(x > 0, x, x * 0.01)


@triton.jit
def leaky_relu_slope(x):
    """1 above 0, else 0.01."""
    return tl.where(x > 0, 1.0, tl.full(x.shape, 0.01, x.dtype))


@triton.jit
def elu_plus_one(x):
    """x + 1 from 0 on, exp(x) below."""
    return tl.where(x >= 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def elu_plus_one_slope(x):
    """1 from 0 on, exp(x) below."""
    return tl.where(x >= 0, 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def gentle_exp(x):
    """exp(0.2 x)."""
    return tl.exp(x * 0.2)


@triton.jit
def gentle_exp_slope(x):
    """0.2 exp(0.2 x)."""
    return tl.exp(x * 0.2) * 0.2


class Map(NamedTuple):
    """A map as Triton functions.  exact: its values are values of the dtype of x."""

    value: Any
    slope: Any
    exact: bool = False


MAPS = {
    "identity": Map(identity, identity_slope, exact=True),
    "relu": Map(relu, relu_slope, exact=True),
    "positive": Map(positive, relu_slope),
    "leaky_relu": Map(leaky_relu, leaky_relu_slope),
    "elu+1": Map(elu_plus_one, elu_plus_one_slope),
    "exp": Map(gentle_exp, gentle_exp_slope),
}
