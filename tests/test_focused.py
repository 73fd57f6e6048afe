"""Focused attention: its map, where the published one fails, its table and its reduced form."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from linsight import create_attention
from linsight.attention import Tokens, create_core, split_heads
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.graphs import OnImages

F64, EPS = torch.float64, 1e-6


def make_core(dim=16, num_heads=2, *, scale=None, seed=0, **options):
    """A core whose parameters are not those it starts with; `scale` is the raw one, the same for all channels."""
    core = create_core("focused", dim, num_heads, **options)
    torch.manual_seed(seed)
    for parameter in core.parameters():
        nn.init.normal_(parameter, std=0.5)
    if scale is not None:
        nn.init.constant_(core.scale, scale)
    return core


def random_tokens(grid, dim=16, num_heads=2, dtype=F64):
    return Tokens(*torch.randn(3, 2, grid.tokens, num_heads, dim // num_heads, dtype=dtype))


def naive_map(x, scale, power):
    """Steps 3 to 5 as published, `(B, N, C)`."""
    u = (F.relu(x) + EPS) / F.softplus(scale)
    powered = u**power
    return powered / powered.norm(dim=-1, keepdim=True) * u.norm(dim=-1, keepdim=True)


def naive(core, tokens, grid, v=None):
    """All of it through the matrix of weights; `v` `(B, H*W, C)` for the convolution, where it is another."""
    q, k = naive_map(tokens.q.flatten(2), core.scale, core.power), tokens.k.flatten(2)
    if core.positions is not None:
        k = k + F.pad(core.positions, (0, 0, k.shape[1] - core.positions.shape[1], 0))
    k = naive_map(k, core.scale, core.power)
    scores = torch.einsum("bmhd,bnhd->bhmn", split_heads(q, core.num_heads), split_heads(k, core.num_heads))
    weights = scores / (scores.sum(-1, keepdim=True) + scores.shape[-1] * EPS)
    out = torch.einsum("bhmn,bnhd->bmhd", weights, tokens.v)
    v = tokens.v.flatten(2)[:, grid.prefix :] if v is None else v
    canvas = split_heads(v, core.num_heads).permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, grid[:2])
    local = core.dwc(canvas).flatten(2).unflatten(0, (-1, core.num_heads)).permute(0, 3, 1, 2)
    out[:, grid.prefix :] += local
    return out


@pytest.mark.parametrize("power", [1, 2.5, 3, 4])
def test_map_is_the_naive_formula(power):
    core = make_core(power=power).double()
    x = torch.randn(2, 7, 16, dtype=F64)
    mapped = core.features("q", split_heads(x, core.num_heads), None, ()).mapped().flatten(2)
    torch.testing.assert_close(mapped, naive_map(x, core.scale, power), rtol=1e-10, atol=1e-12)
    norm = ((F.relu(x) + EPS) / F.softplus(core.scale)).norm(dim=-1)
    torch.testing.assert_close(mapped.norm(dim=-1), norm)


@pytest.mark.parametrize("grid", [Grid(4, 6), Grid(4, 6, 2)], ids=["", "prefix"])
@pytest.mark.parametrize("options", [{}, {"power": 2.5, "kernel_size": 3}, {"kernel_size": 1}], ids=str)
def test_core_is_the_naive_formula(grid, options):
    core, tokens = make_core(grid=(4, 6), **options).double(), random_tokens(grid)
    torch.testing.assert_close(core(tokens, Layout(grid)), naive(core, tokens, grid), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [0.0, 10.0, 60.0])
def test_dead_tokens_are_finite(scale, dtype):
    """Every channel negative: the published cube of 1e-6 / softplus(t) vanishes in the norm, and divides by 0."""
    grid, core = Grid(4, 6), make_core(grid=(4, 6), scale=scale)
    with torch.no_grad():
        core.positions.copy_(-core.positions.abs())
    tokens = random_tokens(grid, dtype=torch.float32)
    leaves = [(-t.abs()).to(dtype).requires_grad_() for t in (tokens.q, tokens.k)] + [tokens.v.to(dtype)]
    core = core.to(dtype)
    out = core(Tokens(*leaves), Layout(grid))
    assert out.isfinite().all()
    gradients = torch.autograd.grad(out.sum(), [*leaves[:2], *core.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_dead_tokens_have_the_right_values():
    grid, core = Grid(4, 6), make_core(scale=10.0)
    q, k, v = random_tokens(grid, dtype=torch.float32)[:3]
    tokens = Tokens(-q.abs(), -k.abs(), v)
    exact = naive(core.double(), Tokens(*(t.double() for t in tokens[:3])), grid)
    torch.testing.assert_close(core.float()(tokens, Layout(grid)).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_a_power_of_32_is_finite(size, dtype):
    """The paper's largest; the published form overflows."""
    grid, core = Grid(4, 6), make_core(power=32, grid=(4, 6)).to(dtype)
    tokens = random_tokens(grid, dtype=torch.float32)
    q, k = ((size * t).to(dtype).requires_grad_() for t in (tokens.q, tokens.k))
    v = tokens.v.to(dtype)
    out = core(Tokens(q, k, v), Layout(grid))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.mean(), [q, k, *core.parameters()]))
    exact = core.double()(Tokens(q.double(), k.double(), v.double()), Layout(grid))
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


def test_half_precision_at_scale_32():
    """One Swin layer at 224, where the published code is not finite, also with its repair, also under autocast."""
    grid, layer = Grid(56, 56), create_attention("focused", 96, 3, grid=(56, 56))
    x = 32 * torch.randn(1, grid.tokens, 96)
    with torch.autocast("cpu", torch.float16):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, grid)
        out.float().mean().backward()
    assert out.isfinite().all() and leaf.grad.isfinite().all()
    exact = layer.double()(x.double(), grid)
    assert (out - exact).abs().max() <= 5e-3 * exact.abs().max()
    leaf = x.half().requires_grad_()
    out = layer.half()(leaf, grid)
    out.float().mean().backward()
    assert out.isfinite().all() and leaf.grad.isfinite().all()
    assert (out - exact).abs().max() <= 5e-3 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_set_grid_is_what_the_forward_does(dtype):
    grid, core = Grid(5, 9), make_core(grid=(4, 6)).to(dtype)
    tokens = random_tokens(grid, dtype=dtype)
    before = core(tokens, Layout(grid))
    core.positions.requires_grad_(False)
    core.set_grid((5, 9))
    assert core.positions.shape == (1, 45, 16) and core.positions.dtype == dtype and not core.positions.requires_grad
    assert "positions" in core.state_dict() and core.size == (5, 9)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(core(tokens, Layout(grid)), before, rtol=tolerance, atol=tolerance)
    core.positions.requires_grad_()
    core.set_grid((5, 9))
    core.set_grid((4, 6))
    assert core.positions.requires_grad and core.positions.is_leaf


def test_the_table_is_that_of_the_keys():
    """A reduction has fewer of them, before and after a move; without a grid there is no table."""
    layer = create_attention("focused", 16, 2, grid=(8, 12), projections="q_kv", reduction=2)
    assert layer.core.positions.shape == (1, 24, 16)
    layer.set_grid((10, 7))
    assert layer.core.positions.shape == (1, 15, 16)
    bare = create_attention("focused", 16, 2)
    bare.set_grid((3, 3))
    assert bare.core.positions is None and "core.positions" not in bare.state_dict()
    assert bare.core.fit_table("positions", torch.randn(1, 49, 16)) is None


def test_fit_table():
    core, table = make_core(grid=(4, 6)), torch.randn(1, 49, 16)
    fitted = core.fit_table("positions", table)
    assert (fitted.old, fitted.new) == ((7, 7), (4, 6))
    canvas = table.unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    truth = F.interpolate(canvas, (4, 6), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(fitted.tensor, truth, rtol=0, atol=1e-5)
    assert core.fit_table("positions", torch.randn(1, 48, 16)) is None
    assert core.fit_table("scale", torch.randn(1, 1, 16)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
def test_reduced_keys(dtype):
    """v of 2x3 keys on a grid of 5x7: stretched along the flattened sequence, in full precision."""
    grid, coarse, core = Grid(5, 7), Grid(2, 3), make_core(grid=(2, 3)).to(dtype)
    tokens = random_tokens(coarse, dtype=dtype)._replace(q=random_tokens(grid, dtype=dtype).q)
    out = core(tokens, Layout(grid), context_layout=Layout(coarse))
    assert out.dtype == dtype
    exact_core, exact_tokens = core.double(), Tokens(*(t.double() for t in tokens[:3]))
    v = F.interpolate(exact_tokens.v.flatten(2).mT, 35, mode="linear").mT
    exact = naive(exact_core, exact_tokens, grid, v)
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6, F64: 1e-10}[dtype]
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.timeout(300)  # as in the matrix
@pytest.mark.parametrize(
    ("options", "stride"), [pytest.param({}, 2, marks=pytest.mark.full), ({"pool": 3}, 1)], ids=str
)
def test_export_with_dynamic_sizes(options, stride):
    """Behind a stride, as in a host, where a table must add no guard on the sizes; and with reduced keys."""
    layer = create_attention("focused", 16, 2, grid=(4, 6), **options)
    model = nn.Sequential(nn.Conv2d(16, 16, stride, stride), OnImages(layer)).eval()
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    exported = torch.export.export(model, (torch.randn(2, 16, 8, 10),), dynamic_shapes=(dims,)).module()
    for batch, height, width in ((2, 8, 12), (3, 4, 7), (4, 9, 6)):
        x = torch.randn(batch, 16, height, width)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"kernel_size": 0}, {"power": 0}, {"power": float("nan")}])
def test_bad_options(options):
    with pytest.raises(LinsightError, match="'focused' must be") as caught:
        create_core("focused", 16, 2, **options)
    assert "\n" not in str(caught.value)


def test_parameters_keep_their_order():
    """Saved states of optimisers know parameters by it."""
    names = [name for name, _ in create_core("focused", 16, 2, grid=(4, 4)).named_parameters()]
    assert names == ["scale", "positions", "dwc.weight", "dwc.bias"]
