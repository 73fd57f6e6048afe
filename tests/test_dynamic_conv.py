"""Dynamic convolutions against timm's CondConv2d, by both gates, of kept tokens."""

import pytest
import torch
from timm.layers.cond_conv2d import CondConv2d

from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_core_is_timms_convolution_by_the_mean_token(kernel, gate):
    grid = Grid(4, 3)
    core = create_core("dynamic_conv", 8, 2, kernel_size=kernel, gate=gate).double()
    theirs = CondConv2d(8, 8, kernel, padding="", groups=8, num_experts=4).double()
    theirs.weight.data = core.kernels.detach().flatten(1)
    tokens = random_tokens(core, 2, grid, dim=8)
    keep = torch.arange(12).expand(2, -1) % 5 != 3
    shares = torch.stack([core.router(x[kept].mean(0)) for x, kept in zip(tokens.q.flatten(2), keep, strict=True)])
    shares = shares.softmax(-1) if gate == "softmax" else shares.sigmoid()
    canvas = tokens.v.flatten(2).masked_fill(~keep[..., None], 0).transpose(1, 2).unflatten(2, grid[:2])
    close(core(tokens._replace(keep=keep), Layout(grid)).flatten(2), theirs(canvas, shares).flatten(2).transpose(1, 2))
