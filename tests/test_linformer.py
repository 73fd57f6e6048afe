"""Linformer against E times the keys, at its own grid and at others, with prefix tokens; loading other grids."""

import pytest
import torch

import linsight
from linsight import create_attention
from linsight.attention import create_core
from linsight.errors import CapabilityError, LinsightError
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


def definition(core, tokens, table, prefix=0):
    """With the whole of E `(H, k, N)`, times keys and values of the grid."""
    out = torch.zeros_like(tokens.v)
    for h in range(core.num_heads):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        keys, values = table[h] @ k[prefix:], table[h] @ v[prefix:]
        if core.prefix_weight is not None:
            keys = keys + core.prefix_weight[h, :, None] * k[:prefix].sum(0)
            values = values + core.prefix_weight[h, :, None] * v[:prefix].sum(0)
        out[0, :, h] = (q @ keys.T * q.shape[1] ** -0.5).softmax(-1) @ values
    return out


@pytest.mark.parametrize("prefix_weight", [False, True])
def test_core_is_its_definition(prefix_weight):
    core = create_core("linformer", 8, 2, rank=3, grid=(3, 4), prefix_weight=prefix_weight).double()
    torch.nn.init.normal_(core.E)
    tokens = random_tokens(core, 1, Grid(3, 4, 2), dim=8)
    close(core(tokens, Layout(Grid(3, 4, 2))), definition(core, tokens, core.E, 2))


def test_another_grid_is_a_resampled_table():
    """Bicubic, as torch's; sums over more tokens stay as large; and `set_grid` does the same for good."""
    core, grid = create_core("linformer", 8, 2, rank=3, grid=(3, 4)).double(), Grid(7, 5)
    torch.nn.init.normal_(core.E)
    canvas = core.E.unflatten(-1, (3, 4))
    table = torch.nn.functional.interpolate(canvas, (7, 5), mode="bicubic").flatten(-2) * (12 / 35)
    tokens = random_tokens(core, 1, grid, dim=8)
    out = core(tokens, Layout(grid))
    close(out, definition(core, tokens, table))
    core.set_grid((7, 5))
    assert core.E.shape == (2, 3, 35)
    close(core(tokens, Layout(grid)), out)


def test_tables_of_other_grids_are_loaded(tmp_path):
    """A state of a 2x8 layer comes to one of 6x6."""
    source = create_attention("linformer", 8, 2, rank=3, grid=(2, 8)).double()
    torch.nn.init.normal_(source.core.E)
    layer = create_attention("linformer", 8, 2, rank=3, grid=(6, 6)).double()
    torch.save(source.state_dict(), tmp_path / "layer.pt")  # whose metadata tells the grid
    linsight.load_published(layer, tmp_path / "layer.pt")
    source.set_grid((6, 6))
    close(layer.core.E, source.core.E)


def test_what_it_refuses():
    with pytest.raises(LinsightError, match="rank=0"):
        create_core("linformer", 8, 2, rank=0)
    layer = create_attention("linformer", 8, 2)
    with pytest.raises(CapabilityError, match="dropping tokens"):
        layer(torch.randn(1, 6, 8), Grid(2, 3), keep=torch.ones(1, 6, dtype=torch.bool))
