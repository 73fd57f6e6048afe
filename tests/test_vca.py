"""Visual-contrast attention against its definition written out; its blocks' lambdas; mistakes."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import Tokens, create_core, merge_heads, split_heads
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout

F64 = torch.float64


def make_core(dim=16, heads=2, **options):
    core = create_core("vca", dim, heads, **options).double()
    torch.manual_seed(0)
    for parameter in core.parameters():
        nn.init.normal_(parameter, std=0.5)
    return core


def rms_norm(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight


def defined(core, tokens, grid, index):
    """Steps 2 to 6 of the definition, with every map written out."""
    heads, prefix, start = core.num_heads, grid.prefix, 0.8 - 0.6 * math.exp(-0.3 * index)
    q, k, v = (t.transpose(1, 2) for t in tokens[:3])
    canvas = merge_heads(tokens.q)[:, prefix:].transpose(1, 2).unflatten(2, grid[:2])
    pooled = F.adaptive_avg_pool2d(canvas, (core.side, core.side)).flatten(2).transpose(1, 2)
    plus, minus = (split_heads(pooled + e, heads).transpose(1, 2) for e in (core.e_pos, core.e_neg))
    scale = k.shape[-1] ** -0.5

    def weight(stage):
        q1, k1, q2, k2 = (getattr(core, f"lambda_{stage}_{name}") for name in ("q1", "k1", "q2", "k2"))
        return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + start

    first, second = ((scale * t @ k.mT).softmax(-1) @ v for t in (plus, minus))
    values = (1 - start) * rms_norm(first - weight(1) * second, core.subln1)
    if core.joint:
        ours, theirs = (scale * q @ torch.cat([plus, minus], 2).mT).softmax(-1).chunk(2, -1)
    else:
        ours, theirs = ((scale * q @ t.mT).softmax(-1) for t in (plus, minus))
    out = (1 - start) * rms_norm((ours - weight(2) * theirs) @ values, core.subln2)
    out = out.transpose(1, 2)
    if core.dwc is not None:
        canvas = merge_heads(tokens.v)[:, prefix:].transpose(1, 2).unflatten(2, grid[:2])
        local = split_heads(core.dwc(canvas).flatten(2).transpose(1, 2), heads)
        out = torch.cat([out[:, :prefix], out[:, prefix:] + local], 1)
    return out


@pytest.mark.parametrize("grid", [Grid(5, 7), Grid(3, 2, 1), Grid(1, 1, 2)])
@pytest.mark.parametrize("options", [{}, {"joint": False}, {"local": False, "contrast_tokens": 9}], ids=str)
@pytest.mark.parametrize("index", [0, 7])
def test_core_is_its_definition(index, options, grid):
    core = make_core(index=index, **options)
    tokens = Tokens(*torch.randn(3, 2, grid.tokens, 2, 8, dtype=F64))
    torch.testing.assert_close(core(tokens, Layout(grid)), defined(core, tokens, grid, index), rtol=1e-9, atol=1e-10)


def test_lambda_follows_the_depth():
    """Of a model, that of each block; alone, that of the first."""
    model = linsight.create_model("vca_deit_tiny", embed_dim=32, num_heads=2, depth=3, img_size=32, num_classes=3)
    starts = [block.attn.core.lambda_init for block in model.blocks]
    assert starts == [0.8 - 0.6 * math.exp(-0.3 * i) for i in range(3)]
    assert create_attention("vca", 16, 2).core.lambda_init == starts[0] == pytest.approx(0.2)


@pytest.mark.parametrize("count", [0, 10])
def test_contrast_tokens_are_a_square(count):
    with pytest.raises(LinsightError, match=f"contrast_tokens={count} of 'vca' must be a square number"):
        create_attention("vca", 16, 2, contrast_tokens=count)
