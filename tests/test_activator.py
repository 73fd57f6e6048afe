"""Activator's block by its definition; no token sees another."""

import pytest
import torch
from torch.nn import functional as F

from linsight.attention import create_block
from linsight.ops import Grid
from matrix.subject import close


@pytest.mark.parametrize("mlp", [True, False])
def test_block_is_its_definition(mlp):
    block = create_block("activator", 8, 2, mlp_ratio=2.0, mlp=mlp).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    unit, out = block.unit, block(x, Grid(2, 3, 1))
    inner = block.norm(x)
    truth = x + unit.fc3(unit.norm(F.gelu(unit.fc1(inner))) * unit.norm(unit.fc2(inner)))
    close(out, truth + block.mlp(block.norm(truth)) if mlp else truth)
    close(block(x[:, 3:4], Grid(1, 1)), out[:, 3:4])
