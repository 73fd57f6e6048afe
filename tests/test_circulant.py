"""Circulant attention: against its definition, shifts, odd sizes, and the forms of the correlation."""

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import Grid
from linsight.attention import Tokens, create_core
from linsight.ops import Layout, circular_correlation
from linsight.ops.circulant import by_matrices, operator
from matrix.subject import cast

SIZES = [(1, 1), (1, 6), (5, 1), (2, 2), (4, 6), (7, 13), (14, 11)]


def correlation(a, b):
    """sum_p a[p] b[p + s], offset by offset."""
    height, width = a.shape[-2:]
    rows = [
        torch.stack([(a * b.roll((-y, -x), (-2, -1))).sum((-2, -1)) for x in range(width)], dim=-1)
        for y in range(height)
    ]
    return torch.stack(rows, dim=-2)


def spatial(layer, x, size):
    """The layer by its definition: a score for each offset, softmax, a sum over offsets."""
    maps = (x @ layer.qkv.weight.T).transpose(1, 2).unflatten(2, size)
    q, k, v = maps.chunk(3, dim=1)
    scores = correlation(q, k) / (size[0] * size[1]) ** 0.5
    weights = scores.flatten(2).softmax(-1).view_as(scores)
    out = sum(
        weights[..., y, x, None, None] * v.roll((-y, -x), (-2, -1)) for y in range(size[0]) for x in range(size[1])
    )
    return layer.proj(out.flatten(2).transpose(1, 2) * F.silu(layer.core.gate(x)))


@pytest.mark.parametrize("size", SIZES)
def test_the_layer_is_its_definition(size):
    layer = linsight.create_attention("circulant", 8, 2).double()
    x = torch.randn(2, size[0] * size[1], 8, dtype=torch.float64, requires_grad=True)
    results = []
    for out in (layer(x, size), spatial(layer, x, size)):
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth)


def test_heads_have_no_effect_and_projections_no_bias():
    one, four = (linsight.create_attention("circulant", 8, heads) for heads in (1, 4))
    assert one.qkv.bias is None
    four.load_state_dict(one.state_dict())
    x = torch.randn(2, 12, 8)
    assert torch.equal(one(x, (3, 4)), four(x, (3, 4)))


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_the_layer_moves_with_its_input(size):
    """A circular shift of the grid shifts the output."""
    layer = linsight.create_attention("circulant", 8, 2).double()
    x = torch.randn(1, size[0] * size[1], 8, dtype=torch.float64)

    def shift(x):
        return x.unflatten(1, size).roll((2, -3), (1, 2)).flatten(1, 2)

    out = layer(x, size)
    torch.testing.assert_close(layer(shift(x), size), shift(out))
    assert (shift(out) - out).abs().max() > 1e-3


def test_borders_are_passed():
    """A token at one corner reaches the opposite one: the grid has no rim."""
    layer = linsight.create_attention("circulant", 8, 2).double()
    x = torch.randn(1, 35, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x, (5, 7))[:, 0].sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_every_form_of_the_correlation(size):
    """By FFT, as a compiled graph calls it, and by the matrices that an exported graph holds."""
    a, b = torch.randn(2, 3, 2, *size, dtype=torch.float64)
    truth = correlation(a, b)
    for form in (circular_correlation, lambda a, b: operator(a, b, True), by_matrices):
        torch.testing.assert_close(form(a, b), truth)


@pytest.mark.parametrize("correlate", [True, False])
def test_gradients_of_theoperator(correlate):
    """Of the correlation and of the convolution that its gradient is, twice."""
    leaves = torch.randn(2, 3, 5, 4, dtype=torch.float64).requires_grad_().unbind()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda a, b: operator(a, b, correlate), leaves, fast_mode=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*(leaf.mT for leaf in leaves), correlate), test_utils=tests)


def test_no_complex_numbers_are_exported():
    layer = linsight.create_attention("circulant", 8, 2)
    program = torch.export.export(layer, (torch.randn(1, 20, 8), Grid(4, 5)))
    found = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert found and not any(value.is_complex() for value in found)
    assert not any("linsight" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_mean_in_half_precision(dtype):
    """The mean of a channel is the largest number of its spectrum: made in float32, it costs no digits."""
    core = create_core("circulant", 8, 2).to(dtype)
    tokens = Tokens(*(torch.randn(4, 2, 63, 2, 4) + 20).to(dtype))
    tokens = tokens._replace(x=tokens.x.flatten(2) - 20)
    with torch.no_grad():
        out = core(tokens, Layout(Grid(7, 9))).double()
        truth = core.double()(cast(tokens, torch.float64), Layout(Grid(7, 9)))
    assert (out - truth).abs().max() <= 4 * torch.finfo(dtype).eps * truth.abs().max()


def test_the_published_host():
    """No class token and no position table; any image size."""
    model = linsight.create_model("ca_deit_tiny", depth=2, embed_dim=16, num_heads=1, num_classes=5).eval()
    assert not any("token" in name or "pos_embed" in name for name, _ in model.named_parameters())
    assert model(torch.randn(2, 3, 100, 65)).shape == (2, 5)
    with pytest.raises(linsight.errors.CapabilityError, match="class_token=False"):
        linsight.create_model("vit_tiny", attention="circulant")


def test_a_neutral_start_opens_the_gate():
    core, layout = create_core("circulant", 12, 3), Layout(Grid(3, 4))
    core.start_neutral()
    q, k, v = (torch.randn(2, 12, 3, 4) for _ in range(3))
    out = core(Tokens(q, k, v, x=torch.randn(2, 12, 12)), layout)
    maps = [t.flatten(2).transpose(1, 2).unflatten(2, (3, 4)) for t in (q, k, v)]
    weights = (correlation(*maps[:2]) * 12**-0.5).flatten(2).softmax(-1).unflatten(2, (3, 4))
    wanted = correlation(weights, maps[2]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out.flatten(2), wanted, rtol=1e-5, atol=1e-5)
