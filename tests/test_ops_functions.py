"""Convolutions, feature maps and linear attention against their explicit forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from linsight.fuse.inline import add_products
from linsight.ops import (
    FEATURE_MAPS,
    affine_read,
    causal_linear_attention,
    depthwise_conv,
    dynamic_depthwise_conv,
    linear_absorb,
    linear_attention,
    linear_read,
    merge,
    square_features,
)
from linsight.ops.conv import shifted_products

F64 = torch.float64
SIDE = st.integers(1, 8)


@given(height=SIDE, width=SIDE, kernel=st.sampled_from([1, 3, 5]), bias=st.booleans())
def test_depthwise_conv(height, width, kernel, bias):
    canvas, weight = torch.randn(2, 6, height, width, dtype=F64), torch.randn(6, 1, kernel, kernel, dtype=F64)
    offset = torch.randn(6, dtype=F64) if bias else None
    out = depthwise_conv(canvas.flatten(2).transpose(1, 2), (height, width), weight, offset)
    truth = F.conv2d(canvas, weight, offset, padding=kernel // 2, groups=6)
    torch.testing.assert_close(out, truth.flatten(2).transpose(1, 2))


def test_a_compiler_gets_products_of_small_images_and_a_convolution_of_others():
    """Of one image, in two graphs for all sizes: the first is for a size that is known."""
    graphs = []

    def backend(graph, inputs):
        graphs.append("conv2d" in graph.code)
        return graph.forward

    compiled = torch.compile(lambda x, size, kernels: dynamic_depthwise_conv(x, size, kernels), backend=backend)
    for size in ((5, 6), (7, 9), (11, 3), (4, 8)):
        x, kernels = torch.randn(1, size[0] * size[1], 8), torch.randn(1, 8, 3, 3)
        torch.testing.assert_close(compiled(x, size, kernels), shifted_products(x, size, kernels))
    assert graphs == [False, True]


def added_to_zeros(x, size, kernels):
    return add_products(x.new_zeros(x.shape), x, size, kernels)


@given(height=SIDE, width=SIDE, kernel=st.sampled_from([1, 3, 5]))
@pytest.mark.parametrize("conv", [dynamic_depthwise_conv, shifted_products, added_to_zeros])
def test_dynamic_depthwise_conv(conv, height, width, kernel):
    canvas, kernels = torch.randn(3, 6, height, width, dtype=F64), torch.randn(3, 6, kernel, kernel, dtype=F64)
    out = conv(canvas.flatten(2).transpose(1, 2), (height, width), kernels)
    for i in range(3):
        truth = F.conv2d(canvas[i : i + 1], kernels[i, :, None], padding=kernel // 2, groups=6)
        torch.testing.assert_close(out[i : i + 1], truth.flatten(2).transpose(1, 2))


def test_dynamic_conv_computes_in_the_dtype_of_its_kernels():
    """Half-precision values, float32 kernels, under autocast too."""
    x, kernels = torch.randn(1, 12, 4, dtype=torch.bfloat16), torch.randn(1, 4, 3, 3)
    truth = shifted_products(x.double(), (3, 4), kernels.double())
    with torch.autocast("cpu", torch.bfloat16):
        out = dynamic_depthwise_conv(x, (3, 4), kernels)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


def explicit(q, k, v, mask, eps):
    """The N x N matrix, written out."""
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * mask
    return torch.einsum("bhmn,bnhe->bmhe", scores / (scores.sum(-1, keepdim=True) + eps), v)


def mapped(*shape):
    return torch.rand(*shape, dtype=F64) + 0.1


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_square_features(width):
    q, k = torch.randn(2, 3, 4, width, dtype=F64)
    phi = square_features(q), square_features(k)
    assert phi[0].shape[-1] == width * (width // 2 + 1)
    torch.testing.assert_close((phi[0] * phi[1]).sum(-1), (q * k).sum(-1) ** 2 / 2)


@given(m=st.integers(1, 20), n=st.integers(1, 20), masked=st.booleans(), eps=st.sampled_from([1e-6, 1.0]))
def test_linear_attention(m, n, masked, eps):
    q, k, v = mapped(2, m, 3, 4), mapped(2, n, 3, 4), torch.randn(2, n, 3, 5, dtype=F64)
    keep = torch.rand(2, n) < 0.7 if masked else torch.ones(2, n, dtype=torch.bool)
    truth = explicit(q, k, v, keep[:, None, None, :], eps)
    torch.testing.assert_close(linear_attention(q, k, v, keep=keep, eps=eps), truth)
    half = n // 2
    states = [linear_absorb(k[:, s], v[:, s], keep[:, s]) for s in (slice(0, half), slice(half, n))]
    torch.testing.assert_close(linear_read(q, merge(*states), eps), truth)


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_is_added_to_a_reading_is_not_divided_and_lies_behind_the_prefix(ahead):
    q, k, v = mapped(2, 6, 3, 4), mapped(2, 5, 3, 4), torch.randn(2, 5, 3, 5, dtype=F64)
    add, shift = torch.randn(2, 6 - ahead, 3, 5, dtype=F64), torch.randn(2, 3, 5, dtype=F64)
    state, whole = linear_absorb(k, v), F.pad(add, (0, 0, 0, 0, ahead, 0))
    everything = torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(linear_read(q, state, 0.5, add=add), explicit(q, k, v, everything, 0.5) + whole)
    wanted = torch.einsum("bnhd,bhde->bnhe", q, state.kv) + shift[:, None] + whole
    torch.testing.assert_close(affine_read(q, state.kv, shift, add=add), wanted)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 130, 200])
def test_causal_linear_attention(n):
    q, k, v = mapped(2, n, 3, 4), mapped(2, n, 3, 4), torch.randn(2, n, 3, 5, dtype=F64)
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    torch.testing.assert_close(causal_linear_attention(q, k, v, eps=1e-6), explicit(q, k, v, mask, 1e-6))


def test_causal_gradient():
    q, k, v = (mapped(1, 66, 1, 2).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(lambda *t: causal_linear_attention(*t, eps=1e-6), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_feature_maps_of_large_values(name, dtype):
    """Finite values and gradients as far as the map itself is."""
    limit = 40.0 if name == "exp" else 1e3
    x = torch.tensor([-limit, -10.0, -0.0, 0.0, 10.0, limit], dtype=dtype, requires_grad=True)
    out = FEATURE_MAPS[name](x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_elu_plus_one_is_positive_where_elu_rounds_to_zero():
    x = torch.tensor([-12.0], dtype=torch.bfloat16)
    assert F.elu(x) + 1 == 0
    torch.testing.assert_close(FEATURE_MAPS["elu+1"](x).double(), x.double().exp(), rtol=1e-2, atol=0)
    wide = torch.linspace(-5, 5, 101, dtype=F64)
    torch.testing.assert_close(FEATURE_MAPS["elu+1"](wide), F.elu(wide) + 1)
