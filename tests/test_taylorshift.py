"""TaylorShift against its weights written out, in both forms; when which one runs, and in how many parts."""

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.attention.mechanisms import taylorshift
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

FORMS = ("direct", "efficient")


def published(core, tokens, normalize, scaled):
    """Every weight of every pair of one image."""
    out = torch.zeros_like(tokens.v)
    kept = range(tokens.k.shape[1]) if tokens.keep is None else tokens.keep[0].nonzero()[:, 0].tolist()
    for h in range(core.num_heads):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        for i in range(len(q)):
            if normalize:
                scores = [core.temperature[0, h, 0, 0] * (q[i] / q[i].norm()) @ (k[j] / k[j].norm()) for j in kept]
            else:
                scores = [16**-0.5 * q[i] @ k[j] for j in kept]
            weights = torch.stack([s**2 / 2 + s + 1 for s in scores])
            out[0, i, h] = weights @ v[kept] / weights.sum() * ((len(kept) / 8) ** 0.5 if scaled else 1)
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_core_is_its_weights(form, normalize, scaled):
    options = {"normalize_input": normalize, "output_normalized": scaled}
    core, grid = create_core("taylorshift", 16, 2, form=form, **options).double(), Grid(3, 4, 1)
    for parameter in core.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2)
    for keep in (None, torch.arange(13)[None] % 3 != 1):
        tokens = random_tokens(core, 1, grid, keep=keep)
        close(core(tokens, Layout(grid)), published(core, tokens, normalize, scaled))


@pytest.mark.parametrize("form", FORMS)
def test_it_trains_with_output_normalized(form):
    """The published direct form raises there, for it writes in place."""
    layer = create_attention("taylorshift", 16, 2, form=form, output_normalized=True)
    layer(torch.randn(2, 12, 16), Grid(3, 4)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_the_shorter_form_runs():
    """45 features at a width of 8: pairs up to 45 keys, also where there are more queries."""
    core, ran = create_core("taylorshift", 16, 2), []
    core.direct = lambda tokens: ran.append(tokens.k.shape[1]) or tokens.q
    for count, keys in ((45, 45), (46, 46), (50, 45), (45, 46)):
        q, k, v = torch.randn(1, count, 2, 8), *torch.randn(2, 1, keys, 2, 8)
        core(linsight.attention.Tokens(q, k, v), Layout(Grid(1, count)), context_layout=Layout(Grid(1, keys)))
    assert ran == [45, 45]


def test_features_are_made_in_parts(monkeypatch):
    """For no more tokens at a time than a limit of numbers allows, in both directions; the result is the same."""
    core, grid = create_core("taylorshift", 16, 2, form="efficient").double(), Grid(5, 7)
    tokens = random_tokens(core, 2, grid, keep=torch.rand(2, 35) < 0.7)
    whole, sizes, made = core(tokens, Layout(grid)), [], core.features
    monkeypatch.setattr(taylorshift, "AT_ONCE", 2 * 2 * 45 * 10)
    core.features = lambda name, x, *rest: sizes.append((name, x.shape[1])) or made(name, x, *rest)
    close(core(tokens, Layout(grid)), whole)
    assert sizes == [(name, count) for name in "kq" for count in (10, 10, 10, 5)]


def test_published_keys():
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert set(linsight.export_published(create_attention("taylorshift", 16, 2))) == names | {"temperature"}
    assert set(linsight.export_published(create_attention("taylorshift", 16, 2, normalize_input=False))) == names
