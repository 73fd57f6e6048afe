"""Selective attention: its temperature follows the number of keys, of the causal form by position."""

import math

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

F64 = torch.float64


@pytest.mark.parametrize("causal", [False, True])
def test_core_is_its_definition(causal):
    core, grid = create_core("selective", 16, 2, causal=causal).double(), Grid(3, 4)
    torch.nn.init.constant_(core.beta, 0.2)
    tokens, bias = random_tokens(core, 1, grid), torch.randn(1, 2, 12, 12, dtype=F64)
    truth = torch.zeros_like(tokens.v)
    for h in range(2):
        for i in range(12):
            n = i + 1 if causal else 12
            tau = 1 + math.exp(-math.exp(0.2)) * math.log(n)
            scores = tau * tokens.k[0, :n, h] @ tokens.q[0, i, h] / 8**0.5 + bias[0, h, i, :n]
            truth[0, i, h] = scores.softmax(0) @ tokens.v[0, :n, h]
    close(core(tokens, Layout(grid), score_bias=bias), truth)


def test_starts_close_to_softmax():
    """A factor of 0.0113 of ln N, as published."""
    layer = create_attention("selective", 16, 2)
    assert abs(torch.exp(-layer.core.beta.exp()).item() - 0.0113) < 1e-4
    assert set(linsight.export_published(layer)) == {
        "beta",
        *(f"{name}.{leaf}" for name in ("c_attn", "c_proj") for leaf in ("weight", "bias")),
    }
