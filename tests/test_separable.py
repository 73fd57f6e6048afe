"""Separable attention against timm's layer, and what it refuses."""

import pytest
import torch
from timm.models.mobilevit import LinearSelfAttention

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens

F64 = torch.float64


@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(1, 1)], ids=str)
def test_layer_is_that_of_timm(grid):
    layer, theirs = create_attention("separable", 16, 2).double(), LinearSelfAttention(16).double()
    linsight.load_published(layer, theirs.state_dict())
    x = torch.randn(2, grid.tokens, 16, dtype=F64)
    close(layer(x, grid), theirs(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2))


def test_published_keys_have_the_axes_of_convolutions():
    state = linsight.export_published(create_attention("separable", 16, 2))
    assert {key: tuple(t.shape) for key, t in state.items() if key.endswith("weight")} == {
        "qkv_proj.weight": (33, 16, 1, 1),
        "out_proj.weight": (16, 16, 1, 1),
    }


def test_keys_of_another_sequence_are_refused():
    """timm's form of it reads one row of the weights of v."""
    layer, x = create_attention("separable", 16, 2), torch.randn(1, 6, 16)
    with pytest.raises(CapabilityError, match="'separable' does not support"):
        layer(x, Grid(2, 3), context=x, context_layout=Grid(2, 3))


def test_scores_are_projected():
    core = create_core("separable", 16, 2).double()
    with pytest.raises(LinsightError, match="projections='xkv'"):
        core(random_tokens(core, 1, Grid(2, 3))._replace(extra=None), Layout(Grid(2, 3)))
