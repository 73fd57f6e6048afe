"""Triton's depthwise convolutions and focus map against the plain forms; without a GPU, in Triton's interpreter."""

import pytest
import torch

from matrix.precision import poisoned

pytest.importorskip("triton")

from linsight.errors import LinsightError
from linsight.ops import depthwise_conv, dynamic_depthwise_conv, focus, use_form
from linsight.ops.triton import sizes
from linsight.ops.triton.conv import token_conv, token_conv_sums
from linsight.ops.triton.focus import focus_scales, focus_scales_backward

F64 = torch.float64
HALVES = [torch.float16, torch.bfloat16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("shared", [True, False], ids=["static", "dynamic"])


def randn(*shape, dtype=F64):
    return torch.randn(*shape, dtype=F64).to(DEVICE, dtype).requires_grad_()


def values(batch, size, channels, prefix=0, dtype=F64):
    """Values of a fused qkv projection, behind the prefix: a view without a dense axis but the last."""
    qkv = randn(batch, prefix + size[0] * size[1], 3 * channels, dtype=dtype)
    return qkv[:, prefix:, channels : 2 * channels].detach().requires_grad_()


def weights(batch, channels, side, shared, dtype=F64):
    """Kernels, and a bias where they are shared."""
    if shared:
        return randn(channels, 1, side, side, dtype=dtype), randn(channels, dtype=dtype)
    return (randn(batch, channels, side, side, dtype=dtype),)


def results(form, function, inputs, grad):
    """Output and gradients."""
    with use_form(form):
        out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out))]


def agree(function, inputs, grad):
    """Fail unless Triton's form is the plain one."""
    torch.testing.assert_close(results("triton", function, inputs, grad), results("plain", function, inputs, grad))


def convolution(shared, size):
    conv = depthwise_conv if shared else dynamic_depthwise_conv
    return lambda x, *w: conv(x, size, *w)


@pytest.mark.parametrize(
    ("shared", "size", "channels", "side", "prefix"),
    [
        (True, (5, 7), 6, 3, 1),
        (False, (7, 5), 6, 3, 0),
        (False, (1, 13), 3, 5, 2),
        (False, (2, 2), 9, 1, 0),
        (True, (3, 2), 1, 7, 0),
    ],
    ids=str,
)
def test_outputs_and_gradients(shared, size, channels, side, prefix, monkeypatch):
    monkeypatch.setattr(sizes, "INTERPRETED", 128)  # several blocks and slices
    x = values(2, size, channels, prefix)
    agree(convolution(shared, size), (x, *weights(2, channels, side, shared)), torch.randn_like(x))


def test_any_strides():
    """Channels first in memory, and gradients that are all one number."""
    x, w = randn(2, 6, 20).transpose(1, 2).detach().requires_grad_(), weights(2, 6, 3, False)
    agree(convolution(False, (4, 5)), (x, *w), torch.ones((), device=DEVICE).expand(2, 20, 6))


@BOTH
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_values_meet_float32_kernels(shared, dtype):
    """Twice the error of float32 arithmetic rounded once, at most."""
    inputs = (values(2, (6, 5), 8, dtype=dtype), *weights(2, 8, 3, shared, torch.float32))
    function, grad = convolution(shared, (6, 5)), torch.randn(2, 30, 8, device=DEVICE)
    is_as_exact(function, inputs, grad)


def is_as_exact(function, inputs, grad):
    ours, plain = (results(form, function, inputs, grad) for form in ("triton", "plain"))
    wide = [t.detach().double().requires_grad_() for t in inputs]
    for a, b, exact in zip(ours, plain, results("plain", function, wide, grad), strict=True):
        assert a.dtype == b.dtype
        assert (a - exact).abs().max() <= 2 * (b - exact).abs().max()


def test_sums_over_many_tokens(monkeypatch):
    """In slices, so that float32 keeps its digits: gradients by kernels of 8,100 tokens around 100."""
    monkeypatch.setattr(sizes, "INTERPRETED", 1 << 12)
    x = (randn(1, 8100, 2, dtype=torch.float32) + 100).detach().requires_grad_()
    inputs = (
        x,
        *weights(1, 2, 3, True, torch.float32),
    )
    is_as_exact(convolution(True, (90, 90)), inputs, torch.ones(1, 8100, 2, device=DEVICE))


@BOTH
def test_autocast(shared):
    """The dtype of autocast for a layer's kernels, their own for generated ones."""
    inputs = (values(2, (4, 5), 8, dtype=torch.float32), *weights(2, 8, 3, shared, torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, plain = (
            results(form, convolution(shared, (4, 5)), inputs, torch.ones(2, 20, 8)) for form in ("triton", "plain")
        )
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)


def test_second_derivatives():
    size, x, w = (2, 3), randn(1, 6, 2), weights(1, 2, 3, True)
    found = []
    for form in ("plain", "triton"):
        with use_form(form):
            out = depthwise_conv(x, size, *w)
        first = torch.autograd.grad(out.square().sum(), (x, *w), create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), (x, *w)))
    torch.testing.assert_close(*found)


def operators():
    """Each operator with arguments, dynamic shapes and mixed dtypes among them."""
    x = values(2, (3, 4), 6, 1, torch.float32)
    half, kernels, bias = (
        x.detach().half().requires_grad_(),
        randn(2, 6, 3, 3, dtype=torch.float32),
        randn(6, dtype=torch.float32),
    )
    yield token_conv, (x, 3, 4, kernels, None, False, torch.float32)
    yield token_conv, (half, 3, 4, kernels[:1], bias, True, torch.float16)
    yield token_conv_sums, (x, torch.randn_like(x, requires_grad=True), 3, 4, 2, 3)
    yield focus_scales, (half, randn(6, dtype=torch.float32).detach().exp().requires_grad_(), 3.0)
    column = torch.rand(6, device=DEVICE) + 0.5
    before, after = focus_scales(half.detach(), column, 3.0)
    yield focus_scales_backward, (torch.randn_like(after), half.detach(), column, before, after, 3.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch's check looks at
@pytest.mark.parametrize("index", range(5))
def test_registered_as_torch_asks(index):
    operator, arguments = list(operators())[index]
    torch.library.opcheck(operator, arguments)


@BOTH
def test_compiles_whole(shared):
    """One graph for all sizes."""
    conv = depthwise_conv if shared else dynamic_depthwise_conv

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(x, height, width, *w):
        return conv(x, (height, width), *w)

    torch._dynamo.reset()
    for size in ((3, 5), (4, 7)):
        inputs, grad = (values(2, size, 6), *weights(2, 6, 3, shared)), torch.randn(2, size[0] * size[1], 6)
        ours = results("triton", lambda x, *w: compiled(x, *size, *w), inputs, grad)  # noqa: B023
        torch.testing.assert_close(ours, results("plain", convolution(shared, size), inputs, grad))


def test_refuses_what_does_not_fit():
    x, (w, b) = values(2, (3, 4), 6), weights(2, 6, 3, True)
    with use_form("triton"):
        for size, weight in (((3, 5), w), ((3, 4), w[:5]), ((3, 4), w[..., :2])):
            with pytest.raises(LinsightError, match="do not fit a grid of"):
                depthwise_conv(x, size, weight, b)
        assert depthwise_conv(x[:0], (3, 4), w, b).shape == (0, 12, 6)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 9, 1, 5)], ids=str)
@pytest.mark.parametrize("power", [3, 2.5])
def test_focus(shape, power, monkeypatch):
    monkeypatch.setattr(sizes, "INTERPRETED", 32)
    x = values(shape[0], (1, shape[1]), shape[2] * shape[3], 1).unflatten(2, shape[2:])
    column = (torch.rand(shape[2:], dtype=F64, device=DEVICE) + 0.5).requires_grad_()
    agree(lambda x, column: focus(x, column, power).mapped(), (x, column), torch.randn_like(x))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_focus_is_as_exact(dtype, scale):
    x = (randn(2, 6, 2, 8) * scale).detach().to(dtype)
    x[0, 0] = -x[0, 0].abs()
    column = torch.rand(2, 8, device=DEVICE) + 0.5
    with use_form("triton"):
        ours = focus(x, column, 3)
    with use_form("plain"):
        plain, exact = (focus(t, column.to(t), 3).mapped() for t in (x.float(), x.double()))
    assert ours.x is x and ours.after.dtype == torch.float32
    assert (ours.mapped() - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-7 * exact.abs().max()


def test_focus_hides_no_nan():
    x = torch.ones(1, 2, 1, 4, device=DEVICE)
    x[0, 0, 0, 1] = torch.nan
    with use_form("triton"):
        out = focus(x, torch.ones(1, 4, device=DEVICE), 3).mapped()
    assert out[0, 0].isnan().any() and out[0, 1].isfinite().all()


def test_no_number_is_left_unwritten(monkeypatch):
    """Fresh memory is full of NaN; blocks that reach beyond the ends."""
    monkeypatch.setattr(sizes, "INTERPRETED", 64)
    with poisoned():
        for shared in (True, False):
            x, w = values(2, (3, 5), 5), weights(2, 5, 3, shared)
            assert all(
                t.isfinite().all() for t in results("triton", convolution(shared, (3, 5)), (x, *w), torch.ones_like(x))
            )
        x, column = randn(2, 7, 2, 3), (torch.rand(2, 3, dtype=F64, device=DEVICE) + 0.5).requires_grad_()
        mapped = results("triton", lambda x, column: focus(x, column, 3).mapped(), (x, column), torch.ones_like(x))
        assert all(t.isfinite().all() for t in mapped)
