"""Nexus by its definition, level by level."""

import pytest

from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("order", [1, 3])
def test_core_is_its_levels(order, residual):
    grid, core = Grid(2, 4, 1), create_core("nexus", 8, 2, order=order, residual=residual)
    tokens = random_tokens(core, 1, grid, dim=8)
    for h in range(2):
        q, k, v = (x[0, :, h] for x in tokens[:3])
        for level in range(order):
            p = (q @ k.T / 2).softmax(-1)
            if level < order - 1:
                q, k = (p @ q + q, p @ k + k) if residual else (p @ q, p @ k)
        close(core(tokens, Layout(grid))[0, :, h], p @ v)
