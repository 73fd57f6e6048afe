"""InLine without gradients: its projections are folded into the covariance, or, of few tokens, its steps are few."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from linsight import create_attention
from linsight.attention.mechanisms.inline import InLine
from linsight.ops import Grid, Layout
from matrix.subject import close

GRID = Grid(5, 7, 1)


def layer(**options):
    return create_attention("inline", 16, 2, **options).eval()


@pytest.fixture
def folds(monkeypatch):
    """How often a layer was folded."""
    calls, folded = [], InLine.folded

    def counted(self, x, *rest):
        calls.append(True)
        return folded(self, x, *rest)

    monkeypatch.setattr(InLine, "folded", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "size"), [(1, (3, 4)), (1, (5, 7)), (1, (6, 9)), (3, (5, 7))], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"projections": "q_kv"}, {"qkv_bias": False}, {"proj_bias": False}, {"local": False}],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("conditioned", [False, True])
def test_folded_is_plain(folds, dtype, batch, size, prefix, options, conditioned):
    mixing, grid = layer(**options, dtype=dtype), Grid(*size, prefix)
    x, cond = torch.randn(2, batch, grid.tokens, 16, dtype=dtype) + 3  # a mean, which must cancel
    cond = cond if conditioned else None
    plain = mixing(x, grid, cond=cond)
    assert folds == []
    with torch.no_grad():
        out = mixing(x, grid, cond=cond)
    assert folds == [True]
    close(out, plain, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("grid", [GRID, Grid(7, 9)], ids=["few", "many"])
def test_means_far_from_zero_cost_nothing(grid):
    """Tokens offset by 1000: the error is at most twice that of the plain form."""
    mixing, x = layer(), 1000 + torch.randn(1, grid.tokens, 16)
    exact = layer(dtype=torch.float64)
    exact.load_state_dict(mixing.state_dict())
    truth = exact(x.double(), grid)
    plain = mixing(x, grid)
    with torch.no_grad():
        folded = mixing(x, grid)
    assert (folded - truth).abs().max() <= 2 * (plain - truth).abs().max()


def test_fewer_tokens_than_channels_of_a_batch_are_not_folded(folds):
    with torch.no_grad():
        layer()(torch.randn(2, 15, 16), Grid(3, 5))
    assert folds == []


def test_dropout_of_the_projection_goes_on(folds):
    mixing = layer(proj_drop=0.5).train()
    with torch.no_grad():
        out = mixing(torch.randn(1, GRID.tokens, 16), GRID)
    assert folds == [True] and 0.3 < (out == 0).double().mean() < 0.7


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hooked(mixing):
    mixing.proj.register_forward_hook(lambda module, args, out: 2 * out)


def hooked_core(mixing):
    mixing.core.register_forward_pre_hook(lambda module, args: None)


def replaced(mixing):
    forward = mixing.core.forward
    mixing.core.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def parametrized(mixing):
    parametrize.register_parametrization(mixing.qkv, "weight", Scaled())


def derived(mixing):
    class Doubled(InLine):
        def read(self, *args):
            return 2 * super().read(*args)

    mixing.core.__class__ = Doubled


@pytest.mark.parametrize("change", [hooked, hooked_core, replaced, parametrized, derived], ids=lambda f: f.__name__)
def test_what_somebody_changed_is_not_folded_away(folds, change):
    mixing, x = layer(), torch.randn(1, GRID.tokens, 16)
    change(mixing)
    plain = mixing(x, GRID)
    with torch.no_grad():
        out = mixing(x, GRID)
    assert folds == []
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_values_that_are_not_projected_and_other_output_maps(folds):
    x = torch.randn(1, GRID.tokens, 16)
    mixing, without = layer(projections="qk"), layer()
    without.proj = nn.Identity()
    for mixed in (mixing, without):
        plain = mixed(x, GRID)
        with torch.no_grad():
            torch.testing.assert_close(mixed(x, GRID), plain, rtol=1e-4, atol=1e-5)
    assert folds == []


def test_bias_that_is_no_parameter(folds):
    mixing, x = layer(), torch.randn(1, GRID.tokens, 16)
    plain, bias = mixing(x, GRID), mixing.qkv.bias.detach()
    del mixing.qkv.bias
    mixing.qkv.bias = bias
    with torch.no_grad():
        torch.testing.assert_close(mixing(x, GRID), plain, rtol=1e-4, atol=1e-5)
    assert folds == [True]


def test_condition_of_fewer_tokens():
    mixing, x, cond = layer(), *torch.randn(2, 1, GRID.tokens, 16)
    plain = mixing(x, GRID, cond=cond[:, :5])
    with torch.no_grad():
        torch.testing.assert_close(mixing(x, GRID, cond=cond[:, :5]), plain, rtol=1e-4, atol=1e-5)


def test_what_the_algebra_does_not_hold_for_is_not_folded(folds):
    mixing, x = layer(), torch.randn(2, GRID.tokens, 16)
    with torch.no_grad():
        mixing(x, GRID, keep=torch.rand(2, GRID.tokens) > 0.5)
        mixing(x, Layout(GRID, torch.tensor([[5, 7], [2, 3]])))
        with torch.autocast("cpu", torch.bfloat16):
            mixing(x, GRID)
        mixing.bfloat16()(x.bfloat16(), GRID)
    assert folds == []
    with torch.no_grad():
        layer(feature_map="relu")(x, GRID)
    assert folds == []


@pytest.mark.parametrize(("grid", "folded"), [(Grid(8, 8, 1), True), (Grid(5, 7, 1), False)], ids=str)
def test_compiled(grid, folded):
    """Without gradients, of a size that is known."""
    mixing, x, products = layer(), torch.randn(1, grid.tokens, 16), []

    def backend(graph, inputs):
        products.append(sum("baddbmm" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(mixing, backend=backend, fullgraph=True)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x, grid), mixing(x, grid), rtol=1e-4, atol=1e-5)
    # torch 2.9 takes every graph for one that is exported.
    exporting = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(torch.zeros(()))
    assert products == [5 if folded and not exporting else 2, 2]  # two are the generator's


def test_exported_is_plain(folds):
    with torch.no_grad():
        program = torch.export.export(layer(), (torch.randn(1, 65, 16), Grid(8, 8, 1)))
        program.module()(torch.randn(1, 65, 16), Grid(8, 8, 1))
    assert folds == []


def test_condition_of_another_dtype(folds):
    mixing, x = layer(), torch.randn(1, GRID.tokens, 16)
    plain = mixing(x, GRID, cond=x.bfloat16())
    with torch.no_grad():
        torch.testing.assert_close(mixing(x, GRID, cond=x.bfloat16()), plain, rtol=1e-2, atol=1e-2)
    assert folds == [True]


class OnlyLinear(torch.Tensor):
    """As weights that are quantised: a subclass that knows linear maps alone."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "split" in func.__name__:
            raise NotImplementedError(func.__name__)
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if func is torch.nn.functional.linear else out


def test_weights_of_another_class_are_not_split(folds):
    mixing, x = layer(), torch.randn(1, GRID.tokens, 16)
    plain = mixing(x, GRID)
    mixing.qkv.weight = nn.Parameter(mixing.qkv.weight.detach().as_subclass(OnlyLinear), requires_grad=False)
    assert type(mixing.qkv.weight) is OnlyLinear
    with torch.no_grad():
        torch.testing.assert_close(mixing(x, GRID), plain, rtol=1e-4, atol=1e-5)
    assert folds == []


def test_hooks_of_all_modules_see_the_parts(folds):
    mixing, x, seen = layer(), torch.randn(1, GRID.tokens, 16), []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        with torch.no_grad():
            mixing(x, GRID)
    finally:
        handle.remove()
    assert folds == [] and {mixing.qkv, mixing.core, mixing.proj} <= set(seen)


def test_one_graph_of_any_size():
    """It is not bound to the sizes for which a layer is folded."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer()

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
