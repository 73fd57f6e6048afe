"""Kolmogorov-Arnold attention by its definition, and on another grid than that of its tables."""

import torch

from linsight import create_attention
from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


def weights(core, row, h):
    """sigma of a row of scores: W phi."""
    phi = torch.zeros_like(core.alpha[h, 0, :, 0])
    for m in range(core.alpha.shape[1]):
        for q, a in enumerate(row):
            phi = phi + core.alpha[h, m, :, q] * torch.cos((m + 1) * a)
            phi = phi + core.beta[h, m, :, q] * torch.sin((m + 1) * a)
    return core.weight[h].T @ phi


def test_core_is_its_definition():
    grid = Grid(2, 3)
    core = create_core("karat", 8, 2, rank=3, frequencies=2, grid=(2, 3)).double()
    tokens = random_tokens(core, 1, grid, dim=8)
    out = core(tokens, Layout(grid))
    for h in range(2):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        close(out[0, :, h], torch.stack([weights(core, row, h) @ v for row in q @ k.T / 2]))


def test_sums_over_more_keys_stay_as_large():
    """Equal tables and tokens: twice the keys in each direction give the same outputs; and so once moved there."""
    layer = create_attention("karat", 8, 2, grid=(2, 3)).double()
    for table in (layer.core.alpha, layer.core.beta, layer.core.weight):
        table.data = table.data[..., :1].expand_as(table).clone()
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    out = layer(x.expand(1, 6, 8), Grid(2, 3))[:, :1]
    for _ in range(2):
        close(layer(x.expand(1, 24, 8), Grid(4, 6))[:, :1], out)
        layer.set_grid((4, 6))
    assert layer.core.alpha.shape[-1] == 24
