"""Reversed attention by its definition; what is sent arrives."""

import torch

from linsight.attention import create_core
from linsight.ops import Grid, Layout
from matrix.subject import close, random_tokens


def test_core_is_its_definition():
    """Message by message, of kept tokens."""
    grid, core = Grid(2, 3, 1), create_core("dependencyvit", 8, 2).double()
    keep = torch.arange(7) % 3 != 1
    tokens = random_tokens(core, 1, grid, dim=8, keep=keep[None])
    out = core(tokens, Layout(grid))
    share = core.selector(tokens.x[0]).softmax(-1)
    gate = core.controller(tokens.x[0]).sigmoid()
    for h in range(2):
        q, k, v = (x[0, keep, h] for x in tokens[:3])
        forward = (q @ k.T / 2).softmax(-1)
        close(out[0, keep, h], forward.T @ (v * share[keep, h, None] * gate[keep]))


def test_tokens_receive_what_is_sent():
    """Without selector and controller no value is lost: the sums over tokens are the same."""
    grid, core = Grid(3, 4), create_core("dependencyvit", 8, 2, selector=False, controller=False)
    tokens = random_tokens(core, 2, grid, dim=8)
    close(core(tokens, Layout(grid)).sum(1), tokens.v.sum(1))
