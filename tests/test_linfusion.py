"""LinFusion against its formula, in self-attention and of a context; its maps, keys, projections and range."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import Tokens, create_core
from linsight.convert import MultiheadAttention, attention_class
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close

F64 = torch.float64


def residual(x, f):
    """x + F(x), of the weights of a map."""
    if isinstance(f, torch.nn.Identity):
        return 2 * x
    u = x @ f[0].weight.T + f[0].bias
    u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    u = u * f[1].weight + f[1].bias
    return x + torch.where(u > 0, u, 0.01 * u) @ f[3].weight.T + f[3].bias


def definition(layer, x, y, heads):
    """The layer of one image `(M, C)` with keys of `y` `(N, C)`, token by token."""
    q = residual(x, layer.map_q) @ layer.q.weight.T
    k = residual(y, layer.map_k) @ layer.k.weight.T
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (F.elu(q) + 1, F.elu(k) + 1, y @ layer.v.weight.T))
    out = torch.zeros_like(q)
    for i in range(len(x)):
        for h in range(heads):
            weights = k[:, h] @ q[i, h]
            out[i, h] = weights @ v[:, h] / len(x) / (weights.mean() + 1e-4)  # N_q above the line
    return out.flatten(1) @ layer.proj.weight.T + layer.proj.bias


def make_layer(mid_dim=0, **options):
    layer = create_attention("linfusion", 8, 2, mid_dim=mid_dim, qkv_bias=False, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("mid_dim", [0, 3, -1])
def test_layer_is_its_definition(mid_dim):
    layer, x = make_layer(mid_dim), torch.randn(2, 7, 8, dtype=F64)
    out = layer(x, Grid(2, 3, 1))
    for image, ours in zip(x, out, strict=True):
        close(ours, definition(layer, image, image, 2))


def test_a_context_is_divided_by_the_number_of_queries():
    """As published: above the line by N_q, below it by N_k; of an image's own tokens, and of those that are kept."""
    layer, x, y = make_layer(), torch.randn(1, 5, 8, dtype=F64), torch.randn(1, 12, 8, dtype=F64)
    out = layer(x, Grid(1, 5), context=y, context_layout=Grid(3, 4))
    close(out[0], definition(layer, x[0], y[0], 2))
    kept = layer(x, Grid(1, 5), context=y, context_layout=Grid(3, 4), keep=torch.arange(12)[None] < 7)
    close(kept[0], definition(layer, x[0], y[0, :7], 2))
    sizes = Layout(Grid(2, 4), torch.tensor([[1, 3]]))  # of 8 places three are an image
    padded = F.pad(x[:, :3], (0, 0, 0, 5))
    close(layer(padded, sizes, context=y, context_layout=Grid(3, 4))[0, :3], definition(layer, x[0, :3], y[0], 2))


def test_a_coarser_grid_of_keys_is_such_a_context():
    layer = make_layer(reduction=2)
    x = torch.randn(1, 24, 8, dtype=F64)
    coarse = layer.reduction(x, Grid(4, 6))[0]
    close(layer(x, Grid(4, 6))[0], definition(layer, x[0], coarse[0], 2))


def test_projections_in_one_matrix_are_the_same_function():
    """timm's `qkv` in the place of three: each part of it is made of what is its own."""
    apart = make_layer()
    joined = create_attention("linfusion", 8, 2, qkv_bias=False, projections="qkv").double()
    linsight.load_published(joined, linsight.export_published(apart))
    assert joined.qkv.weight.shape == (24, 8)
    x = torch.randn(2, 6, 8, dtype=F64)
    close(joined(x, Grid(2, 3)), apart(x, Grid(2, 3)))
    made = attention_class("linfusion", grid=(2, 3))(8, num_heads=2)
    assert made(torch.randn(1, 6, 8)).shape == (1, 6, 8)


def test_published_keys():
    layer = make_layer(3)
    state = linsight.export_published(layer)
    maps = {
        f"to_{n}_.{part}" for n in "qk" for part in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    }
    assert set(state) == {*(f"to_{n}.weight" for n in "qkv"), "to_out.0.weight", "to_out.0.bias", *maps}
    assert state["to_q_.0.weight"].shape == (3, 8)
    assert not {key for key in linsight.export_published(make_layer(-1)) if key.startswith(("to_q_", "to_k_"))}
    other = make_layer(3)
    linsight.load_published(other, state)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), layer.parameters(), strict=True))


def test_its_map_is_not_zero_at_the_start():
    """As published, so that a layer with a host's projections does not begin as it would without the maps."""
    layer = create_attention("linfusion", 8, 2)
    assert all(layer.get_submodule(f"map_{name}.3").weight.abs().sum() > 0 for name in "qk")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_that_vanish_leave_finite_numbers(dtype):
    """Far below 0 ELU + 1 is near 0, and in half precision 0: then the constant is what is below the line."""
    core, shape = create_core("linfusion", 8, 2), (1, 6, 2, 4)
    tokens = Tokens(torch.full(shape, -30.0), torch.full(shape, -30.0), torch.randn(shape))
    exact = math.exp(-60) * 4 / (math.exp(-60) * 4 + 1e-4) * tokens.v.double().mean(1, keepdim=True)
    leaves = [t.to(dtype).requires_grad_() for t in tokens[:3]]
    out = core(Tokens(*leaves), Layout(Grid(2, 3)))
    out.sum().backward()
    assert out.dtype == dtype and all(t.grad.isfinite().all() for t in leaves)
    torch.testing.assert_close(out.double(), exact.expand_as(out), rtol=1e-4, atol=1e-7)


def test_states_of_half_precision_are_sums_in_float32():
    """More tokens than half precision counts."""
    core, tokens = create_core("linfusion", 4, 1), torch.randn(3, 1, 5000, 1, 4).half()
    exact = copy.deepcopy(core).double()(Tokens(*tokens.double()), Layout(Grid(50, 100)))
    ours = core.half()(Tokens(*tokens), Layout(Grid(50, 100)))
    assert (ours.double() - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_what_it_refuses():
    with pytest.raises(LinsightError, match="mid_dim=-2 of 'linfusion'"):
        create_core("linfusion", 8, 2, mid_dim=-2)
    with pytest.raises(CapabilityError, match="'linfusion' has projections of its own"):
        MultiheadAttention(8, 2, attention="linfusion")
