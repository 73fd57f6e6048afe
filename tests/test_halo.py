"""Halo attention: timm's layer on grids that blocks divide, zeros beyond any other, parts, and its published keys."""

import pytest
import torch
from timm.layers.halo_attn import HaloAttn
from torch import nn
from torch.nn import functional as F

import linsight
from linsight import create_attention
from linsight.attention import Tokens, create_core
from linsight.errors import LinsightError
from linsight.ops import Grid, Layout
from matrix.costs import Elements


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [(4, 8), (5, 7), (1, 3)], ids=str)
def test_equals_timms_layer_on_a_map_with_zeros_around(size, scaled):
    """timm refuses sides that blocks do not divide: there its map is padded behind its projections, which have none."""
    options = {"block_size": 4, "halo_size": 3, "scale_pos_embed": scaled}
    theirs = HaloAttn(16, num_heads=2, **options).eval()
    ours = create_attention("halo", 16, 2, qkv_bias=False, projections="qkv", **options)
    ours.proj = nn.Identity()
    state = theirs.state_dict()
    linsight.load_published(ours, state)
    x = torch.randn(2, 16, *size)
    high, wide = (-side % 4 for side in size)
    truth = theirs(F.pad(x, (0, wide, 0, high)))[..., : size[0], : size[1]]
    out = ours(x.flatten(2).transpose(1, 2), Grid(*size)).transpose(1, 2).unflatten(2, size)
    torch.testing.assert_close(out, truth)
    exported = linsight.export_published(ours)
    assert exported.keys() == state.keys() and all(torch.equal(exported[key], state[key]) for key in state)


def test_blocks_are_answered_in_parts_where_nothing_is_recorded():
    core, grid = create_core("halo", 8, 4, block_size=8, halo_size=4), Grid(76, 69)
    tokens = Tokens(*torch.randn(3, 1, grid.tokens, 4, 2))
    with Elements() as at_once:
        recorded = core(tokens, Layout(grid))
    with torch.no_grad(), Elements() as in_parts:
        torch.testing.assert_close(core(tokens, Layout(grid)), recorded)
    assert in_parts.largest <= 2**22 < at_once.largest < grid.tokens**2


@pytest.mark.parametrize("options", [{"block_size": 0}, {"halo_size": -1}], ids=str)
def test_windows_that_are_none_are_refused(options):
    with pytest.raises(LinsightError, match=f"{next(iter(options))}=.* of 'halo'"):
        create_attention("halo", 8, 2, **options)
