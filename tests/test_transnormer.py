"""TransNormer's two attentions against their definitions; the norm over all heads; large sums in half precision."""

import pytest
import torch
from torch.nn import functional as F

from linsight.attention import create_core
from linsight.attention.mechanisms.transnormer import normed
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


def r(x):
    """Over all heads of a token, `(N, H, E)`."""
    return x / (x.flatten(1).norm(dim=1) * x[0].numel() ** -0.5 + 1e-8)[:, None, None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", ["elu", "elu+1"])
def test_norm_attention_has_no_denominator(feature_map, causal):
    core, grid = create_core("transnormer", 8, 2, feature_map=feature_map, causal=causal).double(), Grid(5, 14)
    tokens = random_tokens(core, 1, grid, dim=8)
    q, k = (F.elu(x[0]) + (feature_map == "elu+1") for x in tokens[:2])
    scores = torch.einsum("ihd,jhd->hij", q, k)
    close(
        core(tokens, Layout(grid))[0], r(torch.einsum("hij,jhe->ihe", scores.tril() if causal else scores, tokens.v[0]))
    )


@pytest.mark.parametrize("scores", ["softmax", "relu"])
def test_chunks_see_themselves_and_the_zeros_of_the_last(scores):
    core, grid = create_core("transnormer_diag", 8, 2, chunk=4, scores=scores).double(), Grid(2, 4, 2)
    tokens = random_tokens(core, 1, grid, dim=8)
    q, k, v = (F.pad(x[0], (0, 0, 0, 0, 0, 2)) for x in tokens[:3])
    found = []
    for i in range(grid.tokens):
        chunk = slice(i // 4 * 4, i // 4 * 4 + 4)
        products = torch.einsum("hd,jhd->hj", q[i], k[chunk]) / 2
        weights = products.softmax(-1) if scores == "softmax" else products.relu()
        found.append(torch.einsum("hj,jhe->he", weights, v[chunk]))
    out = torch.stack(found)
    close(core(tokens, Layout(grid))[0], out if scores == "softmax" else r(out))


def test_sums_above_float16_are_normed():
    core, grid = create_core("transnormer", 8, 2).half(), Grid(32, 32)
    tokens = random_tokens(core, 1, grid, dim=8)
    tokens = tokens._replace(k=tokens.k + 50, v=tokens.v + 50)  # sums of 2.5e6
    exact = core.double()(tokens, Layout(grid))
    half = core.half()(tokens.each(torch.Tensor.half), Layout(grid))
    assert half.isfinite().all()
    assert (half.double() - exact).abs().mean() < 1e-2


def test_the_norm_of_nothing_is_nothing():
    x = torch.zeros(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    out = normed(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad.isfinite().all()
    close(normed(x.detach() + 1e200), torch.ones_like(x))


def test_what_chunks_refuse():
    with pytest.raises(LinsightError, match="chunk=0"):
        create_core("transnormer_diag", 8, 2, chunk=0)
    with pytest.raises(CapabilityError, match="mergeable state"):
        core = create_core("transnormer_diag", 8, 2)
        core.read(random_tokens(core, 1, Grid(2, 2), dim=8), None, ())
