"""Precision as a contract: a million tokens in half precision, and whole models in it, forward and backward.

What each mechanism owes is in `matrix/precision.py`; here are the operators at full length, and models.
"""

import copy

import pytest
import torch

from linsight.errors import CapabilityError
from linsight.ops import (
    FEATURE_MAPS,
    INNER_MODELS,
    Features,
    InnerGradient,
    Tile,
    accumulator,
    affine_read,
    central_absorb,
    dynamic_depthwise_conv,
    focus,
    gather_pooled,
    inner_forward,
    inner_gradient,
    inner_step,
    kernel_gradient,
    linear_attention,
    read_pooled,
)
from matrix.precision import HALVES, MILLION
from test_hosts import MECHANISMS, build, sizes

WIDTH = 4  # of the one head
N = MILLION.tokens


def linear(q, k, v):
    return linear_attention(Features(q, "elu+1"), Features(k, "elu+1"), v)


def focused(q, k, v):
    column = torch.full((1, WIDTH), 0.7, dtype=accumulator(q.dtype))
    return linear_attention(focus(q, column, 3.0), focus(k, column, 3.0), v)


def inline(q, k, v):
    moments = central_absorb(k, v)
    return affine_read(q, moments.covariance() * WIDTH**-0.5, moments.v, dtype=q.dtype)


def agents(q, k, v):
    pooled = q[:, :: N // 4].detach().to(accumulator(q.dtype))
    return read_pooled(q, pooled, gather_pooled(pooled, k, v, None), None).to(q.dtype)


def training(q, k, v):
    model, w = INNER_MODELS["swiglu"], torch.eye(WIDTH, dtype=accumulator(q.dtype)).repeat(1, 1, 1, 2)
    gradient = InnerGradient(inner_gradient(model, "dot", k, v, w), torch.tensor([N]))
    return inner_forward(model, q, inner_step(w, gradient, scale=1, rate=1)).to(q.dtype)


def local(q, k, v):
    kernels = kernel_gradient(k.flatten(2), v.flatten(2), Tile.whole(MILLION)) / N
    out = dynamic_depthwise_conv(q.flatten(2), (MILLION.height, MILLION.width), kernels)
    return out.unflatten(2, (1, -1)).to(q.dtype)


@pytest.mark.timeout(300)  # as in the matrix
@pytest.mark.parametrize("operator", [linear, focused, inline, agents, training, local])
def test_a_million_half_tokens(operator):
    """Outputs and gradients: finite, and at most twice the error of float32 arithmetic rounded once."""
    q, k, v, grad = torch.randn(4, 1, N, 1, WIDTH).bfloat16()  # which float16 holds too, but for the smallest
    q, k, v, grad = (t.half().bfloat16() for t in (q, k, v, grad))

    def results(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = operator(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact, plain = results(torch.float64), results(torch.float32)
    for dtype in HALVES:
        for ours, rounded, truth in zip(results(dtype), plain, exact, strict=True):
            assert ours.dtype == dtype
            assert ours.isfinite().all()
            assert (ours - truth).abs().max() <= 2 * (rounded.to(dtype) - truth).abs().max()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_nothing_to_divide_by(dtype):
    """relu of negative queries and keys is 0 above and below the line."""
    q, k = (-torch.rand(1, 9, 2, 4).to(dtype) for _ in range(2))
    leaves = [t.requires_grad_() for t in (q, k, torch.randn(1, 9, 2, 4).to(dtype))]
    for queries, keys in ((q, k), (q.abs(), k), (q, k.abs())):
        out = linear_attention(Features(queries, "relu"), Features(keys, "relu"), leaves[2])
        assert torch.equal(out, torch.zeros_like(out))
        assert all(
            t.isfinite().all() for t in torch.autograd.grad(out.sum(), leaves, allow_unused=True) if t is not None
        )


def test_elu_plus_one_learns_from_zeros():
    """Its slope at 0 is 1, where half precision rounds to and zero weights start."""
    x = torch.tensor([-0.0, 0.0], requires_grad=True)
    FEATURE_MAPS["elu+1"](x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


SHALLOW = {
    "vit_tiny": {"depth": 1},
    "pvt_tiny": {"stages": [(8, 1, 1, 2.0, 4), (16, 2, 1, 2.0, 2), (16, 1, 1, 2.0, 2), (16, 2, 1, 2.0, 1)]},
    "swin_tiny": {"depths": (1, 2, 1, 1)},
    "mlla_pyramid_tiny": {"stages": [(8, 1, 1, 2.0), (16, 2, 1, 2.0), (16, 1, 1, 2.0), (16, 1, 1, 2.0)]},
}


# Each mechanism in one of the hosts, by turns; in all of them by `pytest -m full`.
TURNS = [
    pytest.param(host, attention, marks=[] if (turn - place) % len(SHALLOW) == 0 else pytest.mark.full)
    for turn, attention in enumerate(MECHANISMS)
    for place, host in enumerate(SHALLOW)
]


@pytest.mark.parametrize(("host", "attention"), TURNS)
def test_models_in_half_precision(host, attention):
    """`.half()`, `.bfloat16()` and both autocasts: logits and every gradient are finite, for bright images too."""
    built, x = build(host, attention, **SHALLOW[host]), 100 * torch.randn(1, 3, *sizes(host)[0])
    try:  # a quadratic mechanism is given windows, and in shifted ones has to drop tokens
        built(x)
    except CapabilityError as error:
        pytest.skip(str(error))
    for dtype in HALVES:
        for autocast in (False, True):
            model = copy.deepcopy(built) if autocast else copy.deepcopy(built).to(dtype)
            with torch.autocast("cpu", dtype, enabled=autocast):
                out = model(x if autocast else x.to(dtype))
            out.float().square().mean().backward()
            assert out.isfinite().all()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
