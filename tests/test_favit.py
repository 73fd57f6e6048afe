"""FaViT: its windows on any grid, the published averages that mix channels, and the sizes of its groups."""

import pytest
import torch
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention.mechanisms.favit import reflected, windows
from linsight.errors import LinsightError
from linsight.ops import Grid
from matrix.subject import close

F64 = torch.float64


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("grid", [Grid(16, 16), Grid(9, 13)], ids=str)
def test_windows_are_those_of_an_unfolded_reflection(grid, dilation):
    """torch's reflection and unfolding, on grids that these take."""
    stride = 6 * dilation + 1
    right, low = (-side % stride for side in (grid.width, grid.height))
    canvas = torch.arange(grid.tokens, dtype=F64).view(1, 1, grid.height, grid.width)
    canvas = F.pad(canvas, (0, right, 0, low), mode="reflect")
    truth = F.unfold(canvas, 7, dilation=dilation, stride=stride)[0].T
    close(windows(grid, dilation, canvas.device).view(49, -1).T.to(F64), truth)


def test_reflection_goes_on_for_ever():
    """Published windows fail on grids narrower than half a window."""
    assert reflected(torch.arange(9), 4).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert reflected(torch.arange(5), 2).tolist() == [0, 1, 0, 1, 0]
    assert reflected(torch.arange(3), 1).tolist() == [0, 0, 0]
    layer = create_attention("favit", 32, 2, sr_ratio=4)
    for grid in (Grid(1, 1), Grid(1, 9), Grid(3, 40)):
        assert layer(torch.randn(1, grid.tokens, 32), grid).isfinite().all()


def test_averages_mix_channels_of_a_window():
    """Of two windows the numbers 2 j and 2 j + 1 of the row (window, channel) make channel j: half of them each."""
    layer, grid = create_attention("favit", 16, 1).double(), Grid(7, 14)
    layer.fcs[0].weight.data, layer.fcs[0].bias.data = torch.eye(14, dtype=F64), torch.zeros(14, dtype=F64)
    head = layer.single_heads[0]
    head.weight.data, head.bias.data = torch.eye(14, dtype=F64).repeat(2, 1), torch.zeros(28, dtype=F64)
    kv = torch.randn(1, 98, 14, dtype=F64)
    k, _ = layer.factors(0, kv, grid)
    left, right = kv.unflatten(1, (7, 2, 7)).unbind(2)
    pairs = torch.cat([side.flatten(1, 2).unflatten(-1, (7, 2)).mean(-1) for side in (left, right)], dim=-1)
    close(k[:, 0], pairs)


@pytest.mark.parametrize(
    ("dim", "heads", "ratio", "wide", "local"),
    [(64, 2, 2, 8, 28), (64, 4, 1, 8, 56), (96, 2, 4, 12, 42), (8, 2, 1, 2, 6)],
)
def test_groups_share_the_channels(dim, heads, ratio, wide, local):
    """As published where that can be; elsewhere the local groups have whole heads, and the global one the rest."""
    layer = create_attention("favit", dim, heads, sr_ratio=ratio)
    assert (layer.wide, layer.local) == (wide, local)
    assert wide + local * (2 if ratio > 1 else 1) == dim


def test_errors():
    with pytest.raises(LinsightError, match="sr_ratio=0 of 'favit'"):
        create_attention("favit", 32, 2, sr_ratio=0)
    with pytest.raises(LinsightError, match="take fewer heads"):
        create_attention("favit", 16, 16)


def test_dropout_is_on_the_projection():
    layer, x = create_attention("favit", 32, 2, proj_drop=0.5), torch.randn(2, 16, 32)
    assert (layer.train()(x, Grid(4, 4)) == 0).float().mean() > 0.3
    assert not (layer.eval()(x, Grid(4, 4)) == 0).any()
    state = linsight.export_published(layer)
    assert state["kv_l.point_conv.weight"].shape == (28, 28, 1, 1)
    assert {"sr.weight", "norm.weight", "kv_l.depth_conv.weight", "single_heads.0.bias"} <= state.keys()
