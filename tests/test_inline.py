"""InLine without gradients: the layer folds its projections into the covariance."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from linsight import create_attention
from linsight.attention.inline import InLine
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
        out = folded(self, x, *rest)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(InLine, "folded", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"projections": "q_kv"}, {"qkv_bias": False}, {"proj_bias": False}, {"local": False}],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("conditioned", [False, True])
def test_folded_is_plain(folds, dtype, batch, prefix, options, conditioned):
    mixing, grid = layer(**options, dtype=dtype), Grid(5, 7, prefix)
    x, cond = torch.randn(2, batch, grid.tokens, 16, dtype=dtype) + 3  # a mean, which must cancel
    cond = cond if conditioned else None
    plain = mixing(x, grid, cond=cond)
    assert folds == []
    with torch.no_grad():
        out = mixing(x, grid, cond=cond)
    assert folds == [True]
    close(out, plain, 1e-5 if dtype == torch.float32 else 1e-12)


def test_means_far_from_zero_cost_nothing():
    """Tokens offset by 1000: the error is at most twice that of the plain form."""
    mixing, x = layer(), 1000 + torch.randn(1, GRID.tokens, 16)
    exact = layer(dtype=torch.float64)
    exact.load_state_dict(mixing.state_dict())
    truth = exact(x.double(), GRID)
    plain = mixing(x, GRID)
    with torch.no_grad():
        folded = mixing(x, GRID)
    assert (folded - truth).abs().max() <= 2 * (plain - truth).abs().max()


def test_fewer_tokens_than_channels_are_not_folded(folds):
    with torch.no_grad():
        layer()(torch.randn(1, 15, 16), Grid(3, 5))
    assert folds == [False]


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
    assert folds == [False]


@pytest.mark.parametrize(("grid", "folded"), [(Grid(8, 8, 1), True), (Grid(5, 7, 1), False)], ids=str)
def test_compiled(folds, grid, folded):
    """Without gradients, of a size that is known; of any size it is the plain form, and one graph."""
    mixing, x = layer(), torch.randn(1, grid.tokens, 16)
    torch._dynamo.reset()
    compiled = torch.compile(mixing, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, grid), mixing(x, grid), rtol=1e-4, atol=1e-5)
    assert folds == [folded, True]
    torch.testing.assert_close(compiled(x, grid), mixing(x, grid), rtol=1e-4, atol=1e-5)
    assert folds == [folded, True]


def test_exported_is_plain(folds):
    with torch.no_grad():
        program = torch.export.export(layer(), (torch.randn(1, 65, 16), Grid(8, 8, 1)))
        program.module()(torch.randn(1, 65, 16), Grid(8, 8, 1))
    assert folds == []
