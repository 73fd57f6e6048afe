"""Polarized attention: gates that are near constant, what has no effect, what its layer has no place for."""

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.errors import LinsightError
from linsight.ops import Grid
from matrix.subject import close


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_heads_have_no_effect_and_there_is_no_output_projection(form):
    one, four = (create_attention("polarized", 16, heads, form=form).double() for heads in (1, 4))
    four.load_state_dict(one.state_dict())
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    close(four(x, Grid(3, 4)), one(x, Grid(3, 4)))
    assert all(key.startswith("conv_") for key in linsight.export_published(one))


def test_parallel_gates_of_tokens_are_narrow():
    """Between 0.5 and sigmoid(1) = 0.73, so with gates of channels closed an output is about half its input."""
    layer = create_attention("polarized", 8, 1).double()
    torch.nn.init.zeros_(layer.core.up.weight)
    x = torch.randn(1, 64, 8, dtype=torch.float64)
    share = layer(x, Grid(8, 8)) / x - 0.5  # without the gates of channels, which are 0.5 each
    assert (share >= 0.5).all()
    assert (share <= 0.7311).all()


@pytest.mark.parametrize("options", [{"dim": 1}, {"proj_bias": False}, {"projections": "qkv"}], ids=str)
def test_what_it_has_no_place_for_is_refused(options):
    with pytest.raises(LinsightError, match="of 'polarized'") as caught:
        create_attention("polarized", **{"dim": 8, "num_heads": 1, **options})
    assert "\n" not in str(caught.value)
