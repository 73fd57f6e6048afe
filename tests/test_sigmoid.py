"""Sigmoid attention: the bias follows the number of keys, masks, and what published layers hold."""

import math

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

F64 = torch.float64


@pytest.mark.parametrize("causal", [False, True])
def test_core_is_its_definition(causal):
    """With a bias on the scores and a temperature, query by query."""
    core, grid = create_core("sigmoid", 16, 2, causal=causal).double(), Grid(3, 4)
    core.attn_temp.fill_(0.3)
    tokens, bias = random_tokens(core, 1, grid), torch.randn(1, 2, 12, 12, dtype=F64)
    truth = torch.zeros_like(tokens.v)
    for h in range(2):
        for i in range(12):
            seen = range(i + 1) if causal else range(12)
            for j in seen:
                score = tokens.q[0, i, h] @ tokens.k[0, j, h] / 8**0.5 + bias[0, h, i, j]
                truth[0, i, h] += torch.sigmoid(math.exp(0.3) * score - math.log(len(seen))) * tokens.v[0, j, h]
    close(core(tokens, Layout(grid), score_bias=bias), truth)


def test_outputs_do_not_grow_with_the_image():
    """Of a thousand small scores a mean of v / (1 + 1 / N) or so is read; of a stored bias of 0, half of their sum."""
    for n in (10, 1000):
        grid = Grid(1, n)
        core, stored = (create_core("sigmoid", 16, 2, bias=bias).double() for bias in ("count", "stored"))
        tokens = random_tokens(core, 1, grid)
        tokens = tokens._replace(q=torch.zeros_like(tokens.q))
        mean = tokens.v.mean(dim=1, keepdim=True).expand_as(tokens.v)
        close(core(tokens, Layout(grid)), mean * n / (n + 1))
        close(stored(tokens, Layout(grid)), mean * n / 2)


def test_masks_as_a_bias():
    layer, x, grid = create_attention("sigmoid", 16, 2).double(), torch.randn(2, 6, 16, dtype=F64), Grid(2, 3)
    keep = torch.tensor([[True, False, True, True, False, True]] * 2)
    bias = torch.zeros(2, 1, 1, 6, dtype=F64).masked_fill(~keep[:, None, None], float("-inf")).expand(2, 1, 6, 6)
    close(layer(x, grid, score_bias=bias)[keep], layer(x, grid, keep=keep)[keep])
    close(layer(x, grid, score_bias=keep[:, None, None].expand(2, 1, 6, 6))[keep], layer(x, grid, keep=keep)[keep])


def test_published_keys():
    layer = create_attention("sigmoid", 16, 2, bias="stored", qk_norm=True)
    norms = {f"{name}_norm.{leaf}" for name in "qk" for leaf in ("weight", "bias")}
    linear = {f"{name}.{leaf}" for name in ("qkv", "proj") for leaf in ("weight", "bias")}
    state = linsight.export_published(layer)
    assert set(state) == norms | linear | {"attn_bias", "attn_temp"}
    with pytest.raises(LinsightError, match="attn_bias"):  # -ln N of their training would be added to ours
        linsight.load_published(create_attention("sigmoid", 16, 2, qk_norm=True), state)
