"""Additive attention: its definition, timm's layer, the repaired weights, and norms in half precision."""

import pytest
import torch
from timm.models.swiftformer import EfficientAdditiveAttention

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import cast, close, random_tokens

F64 = torch.float64


@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(1, 1)], ids=str)
def test_layer_is_that_of_timm(grid):
    layer, theirs = create_attention("additive", 16, 2).double(), EfficientAdditiveAttention(16, 16).double()
    state = {key.replace("proj", "Proj"): value for key, value in theirs.state_dict().items()}
    linsight.load_published(layer, state)
    x = torch.randn(2, grid.tokens, 16, dtype=F64)
    truth = theirs(x.transpose(1, 2).unflatten(2, grid[:2])).flatten(2).transpose(1, 2)
    close(layer(x, grid), truth)


def test_weights_differ_between_tokens():
    """The first release weighted all tokens alike: then g would be a plain sum."""
    core, grid = create_core("additive", 16, 1).double(), Grid(3, 4)
    tokens = random_tokens(core, 1, grid)
    q, k = (torch.nn.functional.normalize(x[0, :, 0], dim=-1) for x in (tokens.q, tokens.k))
    a = q @ core.w_g[:, 0]
    g = sum(weight * row for weight, row in zip(a / a.norm(), q, strict=True))
    close(core(tokens, Layout(grid))[0, :, 0], core.proj(g * k) + q)


def test_zero_queries_in_half_precision():
    """1e-12 is 0 in float16: norms are taken in float32. What is left is the bias."""
    core, grid = create_core("additive", 16, 1).half(), Grid(2, 3)
    tokens = cast(random_tokens(core, 1, grid), torch.float16)
    out = core(tokens._replace(q=tokens.q * 0, k=tokens.k * 0), Layout(grid))
    assert torch.equal(out[0, :, 0], core.proj.bias.expand(6, -1))
