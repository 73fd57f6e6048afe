"""InLine's layer fused: its projections folded into the covariance, or, of few tokens, its steps few."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import linsight
from linsight import create_attention
from linsight.attention.mechanisms.inline import InLine
from linsight.errors import LinsightError
from linsight.fuse import inline as forms
from linsight.ops import Grid, Layout
from linsight.ops.cpu import halves
from matrix.subject import close

GRID = Grid(5, 7, 1)


def layer(**options):
    return create_attention("inline", 16, 2, **options).eval()


@pytest.fixture
def folds(monkeypatch):
    """How often a layer was folded."""
    calls = []

    def counted(form):
        def call(*given):
            calls.append(form.__name__)
            return form(*given)

        return call

    for form in (forms.of_many, forms.of_few):
        monkeypatch.setattr(forms, form.__name__, counted(form))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "size"), [(1, (3, 4)), (1, (5, 7)), (1, (6, 9)), (3, (5, 7))], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"projections": "q_kv"}, {"qkv_bias": False}, {"proj_bias": False}, {"local": False}],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("reads", [False, True])
def test_folded_is_plain(folds, dtype, batch, size, prefix, options, reads):
    mixing, grid = layer(**options, dtype=dtype), Grid(*size, prefix)
    x, residual = torch.randn(2, batch, grid.tokens, 16, dtype=dtype) + 3  # a mean, which must cancel
    residual = residual if reads else None
    plain = mixing(x, grid, residual=residual)
    assert folds == []
    with torch.no_grad():
        out = linsight.fuse(mixing)(x, grid, residual=residual)
    assert len(folds) == 1
    close(out, plain, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("grid", [GRID, Grid(7, 9)], ids=["few", "many"])
def test_means_far_from_zero_cost_nothing(grid):
    """Tokens offset by 1000: the error is at most twice that of the plain form."""
    mixing, x = layer(), 1000 + torch.randn(1, grid.tokens, 16)
    truth = copy.deepcopy(mixing).double()(x.double(), grid)
    plain, folded = mixing(x, grid), linsight.fuse(mixing)(x, grid)
    assert (folded - truth).abs().max() <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("local", [True, False], ids=["local", "global"])
def test_native_bfloat16_has_the_error_of_plain(folds, monkeypatch, autocast, mean, local):
    """Products of bfloat16 numbers added up in float32; torch computes the same, slowly, where they are not native."""
    torch.manual_seed(0)
    grid = Grid(19, 23, 1)
    mixing, x = create_attention("inline", 64, 2, local=local).eval(), torch.randn(2, grid.tokens, 64) + mean
    if not autocast:
        mixing, x = mixing.bfloat16(), x.bfloat16()
    fused, found = linsight.fuse(mixing), []
    with torch.no_grad():
        truth = copy.deepcopy(mixing).double()(x.double(), grid)
        for native in (False, True):
            monkeypatch.setattr(halves, "is_native", lambda native=native: native)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(fused(x, grid))
        fused(x[:, :25], Grid(4, 6, 1))  # fewer tokens than channels
    assert folds == ["of_many"]
    assert found[1].dtype == found[0].dtype == torch.bfloat16
    plain, folded = ((out - truth).abs().max() for out in found)
    assert folded <= 2 * plain


def test_sums_of_bfloat16_products_are_those_of_float32():
    """What one product loses by rounding, the second adds again: 16 digits of two instead of 8."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 700, 16).bfloat16(), torch.randn(2, 700, 24).bfloat16()
    exact = k.double().mT @ v.double()
    error = (halves.outer_sum(k, v).double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-14 < (exact.bfloat16().double() - exact).abs().max() / exact.abs().max()


def test_dropout_of_the_projection_does_nothing_in_inference():
    mixing, x = layer(proj_drop=0.5), torch.randn(1, GRID.tokens, 16)
    close(linsight.fuse(mixing.train())(x, GRID), mixing.eval()(x, GRID), 1e-5)


class Doubled(InLine):
    def read(self, *args):
        return 2 * super().read(*args)


def derived(mixing):
    core = Doubled(16, 2).eval()
    core.load_state_dict(mixing.core.state_dict())
    mixing.core = core


def other_map(mixing):
    mixing.core.feature_map = "relu"


def other_output(mixing):
    mixing.proj = nn.Sequential(mixing.proj, nn.Tanh())


@pytest.mark.parametrize("change", [derived, other_map, other_output], ids=lambda change: change.__name__)
def test_what_is_another_formula_is_not_folded(folds, change):
    mixing, x = layer(), torch.randn(1, GRID.tokens, 16)
    change(mixing)
    close(linsight.fuse(mixing)(x, GRID), mixing(x, GRID), 1e-5)
    assert folds == []


def test_what_the_algebra_does_not_hold_for_is_not_folded(folds, monkeypatch):
    monkeypatch.setattr(halves, "is_native", lambda: False)
    fused, x = linsight.fuse(layer()), torch.randn(2, GRID.tokens, 16)
    with torch.no_grad():
        fused(x, GRID, keep=torch.rand(2, GRID.tokens) > 0.5)
        fused(x, Layout(GRID, torch.tensor([[5, 7], [2, 3]])))
        fused(x[:, :16], Grid(3, 5, 1))  # of a batch, and no more tokens than channels
        with torch.autocast("cpu", torch.bfloat16):
            fused(x, GRID)
        fused.bfloat16()(x.bfloat16(), GRID)
    assert folds == ["of_many"]


def test_gradients_of_the_input_are_those_of_the_plain_layer():
    mixing, x = layer(), torch.randn(1, GRID.tokens, 16, requires_grad=True)
    found = [torch.autograd.grad(each(x, GRID).square().sum(), x)[0] for each in (mixing, linsight.fuse(mixing))]
    close(*found, 1e-5)


@pytest.mark.parametrize(("grid", "folded"), [(Grid(8, 8, 1), True), (Grid(5, 7, 1), False)], ids=str)
def test_compiled(grid, folded):
    """Without gradients, of a size that is known."""
    fused, x, products = linsight.fuse(layer()), torch.randn(1, grid.tokens, 16), []

    def backend(graph, inputs):
        products.append(sum("baddbmm" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, grid), fused(x, grid), rtol=1e-4, atol=1e-5)
    # torch 2.9 takes every graph for one that is exported.
    exporting = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(torch.zeros(()))
    assert products == [4 if folded and not exporting else 2]  # two are the generator's


@pytest.mark.parametrize(
    ("batch", "size", "folded"), [(2, (8, 8), True), (2, (3, 4), False), (1, (8, 8), False)], ids=str
)
def test_exported_is_folded_where_its_example_has_as_many_tokens_as_channels(folds, batch, size, folded):
    """And is right at every other size, of both sides of that; of one image, whose batch is to be free, it is plain."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.prefix, self.layer = nn.Parameter(torch.randn(1, 1, 16)), linsight.fuse(layer())

        def forward(self, x):
            tokens = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x.flatten(2).mT], dim=1)
            return self.layer(tokens, Grid(*x.shape[2:], 1))

    model, free = Model(), torch.export.Dim.DYNAMIC
    oblivious = {"backed_size_oblivious": batch == 1}  # as the exporter to ONNX takes one image
    with torch.no_grad(), torch.fx.experimental._config.patch(**oblivious):
        program = torch.export.export(
            model, (torch.randn(batch, 16, *size),), dynamic_shapes=({0: free, 2: free, 3: free},)
        )
        assert folds == (["of_many"] if folded else [])
        for shape in ((1, 16, 2, 3), (3, 16, 5, 11), (1, 16, 1, 1))[: 3 * (batch > 1)]:
            x = torch.randn(shape)
            close(program.module()(x), model(x), 1e-5)


def test_mistakes_are_still_one_line():
    fused = linsight.fuse(layer())
    for x, grid in ((torch.randn(1, 36, 8), GRID), (torch.randn(1, 35, 16), GRID), (torch.randn(1, 36, 16), None)):
        with pytest.raises(LinsightError) as caught:
            fused(x, grid)
        assert "\n" not in str(caught.value)


def test_one_graph_of_any_size():
    """It is not bound to the sizes for which a layer is folded."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linsight.fuse(layer())

        def forward(self, x):
            return self.layer(x.flatten(2).mT, x.shape[2:])

    torch._dynamo.reset()
    model, counter = Model(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        for size in ((11, 13), (3, 4), (5, 6)):
            x = torch.randn(1, 16, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
