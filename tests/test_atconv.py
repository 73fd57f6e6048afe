"""Attentive convolution: what its kernels are made of, beyond the published numbers."""

import pytest
import torch

import linsight
from linsight import Grid
from linsight.errors import LinsightError
from linsight.ops import Layout, Tile


def test_kernels_are_of_bands_of_rows():
    """An image turned on its side has other kernels, so the layer is not that of the turned image."""
    layer = linsight.create_attention("atconv", 8, 1).double()
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    out = layer(x.flatten(1, 2), Grid(6, 6)).view_as(x)
    turned = layer(x.transpose(1, 2).flatten(1, 2), Grid(6, 6)).view_as(x).transpose(1, 2)
    assert not torch.allclose(out, turned)
    core = layer.core
    tokens = layer.tokens(x.flatten(1, 2), x.flatten(1, 2), Layout(Grid(6, 6)), None)
    means = core.rounds[0].absorb(core, tokens, Tile.whole(Grid(6, 6)), ())
    bands = tokens.k.flatten(2).transpose(1, 2)
    torch.testing.assert_close(means, torch.nn.functional.adaptive_avg_pool1d(bands, 9))


def test_a_kernel_has_a_middle():
    with pytest.raises(LinsightError, match="kernel_size=4"):
        linsight.create_attention("atconv", 8, 1, kernel_size=4)


def test_large_kernel_attention_sees_eleven_tokens_on_each_side():
    layer, grid = linsight.create_attention("lka", 4, 1).double(), Grid(25, 30)
    x = torch.randn(1, grid.tokens, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x, grid).unflatten(1, (25, 30))[0, 12, 14].sum(), x)
    seen = gradient[0].unflatten(0, (25, 30)).abs().sum(-1) > 0
    assert seen[1:24, 3:26].all() and seen.sum() == 23**2
