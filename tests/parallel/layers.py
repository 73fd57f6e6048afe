"""Cases of layers and blocks: what each rank finds is its share of what one process does."""

import collections
import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from linsight import Grid, create_attention
from linsight.attention import create_block, list_attentions
from linsight.parallel import split

STREAMING = list_attentions(stream=True)
HEIGHTS = {2: (2, 5), 4: (1, 1, 3, 2)}
CASES = {}


@functools.cache
def rows():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("rows",))


def own(heights):
    """First row of this rank and one past its last."""
    bounds = [0, *itertools.accumulate(heights)]
    return bounds[dist.get_rank()], bounds[dist.get_rank() + 1]


def random(module):
    """No parameter at a value that hides a mistake."""
    for parameter in module.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return module


def summed(gradient):
    total = gradient.clone()
    dist.all_reduce(total)
    return total


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape, (found.shape, expected.shape)
    error = float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-3))
    assert error <= tolerance, error


def gradients_sum_to(module, alone, times=1, tolerance=1e-9):
    """Those of `module` on all ranks to `times` that of `alone`, in one collective."""
    pairs = [(p.grad, other.grad) for p, other in zip(module.parameters(), alone.parameters(), strict=True)]
    assert all((found is None) == (expected is None) for found, expected in pairs)
    pairs = [pair for pair in pairs if pair[0] is not None]
    total = summed(torch.cat([found.flatten() for found, _ in pairs]))
    for found, (_, expected) in zip(total.split([found.numel() for found, _ in pairs]), pairs, strict=True):
        close(found.view_as(expected) / times, expected, tolerance)


def same_as_one(layer, heights, width, prefix, dim=16, tolerance=1e-9, conditioned=False):
    """Outputs, and the gradients of the sum of the ranks' losses, are those of one process with all rows."""
    height, dtype = sum(heights), next(layer.parameters()).dtype
    grid = Grid(height, width, prefix)
    first, end = own(heights)
    mine = torch.cat([torch.arange(prefix), torch.arange(prefix + first * width, prefix + end * width)])
    x, weight, cond = (torch.randn(2, grid.tokens, dim, dtype=dtype) for _ in range(3))
    more, part = ({"residual": cond}, {"residual": cond[:, mine]}) if conditioned else ({}, {})
    dense = copy.deepcopy(layer)
    whole = x.clone().requires_grad_()
    expected = dense(whole, grid, **more)
    (expected * weight).sum().backward()

    counted = weight[:, mine].clone()
    if dist.get_rank():
        counted[:, :prefix] = 0  # once, in the loss of the first rank
    band = x[:, mine].clone().requires_grad_()
    found = split(layer, rows())(band, Grid(end - first, width, prefix), **part)
    close(found, expected[:, mine], tolerance)
    (found * counted).sum().backward()
    close(band.grad[:, prefix:], whole.grad[:, mine][:, prefix:], tolerance)
    if prefix:
        close(summed(band.grad[:, :prefix]), whole.grad[:, :prefix], tolerance)
    gradients_sum_to(layer, dense, tolerance=tolerance)


def mechanism(entry, prefix):
    make = create_block if entry.kind == "block" else create_attention
    layer = make(entry.name, 16, 2, grid=(4, 4), dtype=torch.float64)
    same_as_one(random(layer), HEIGHTS[dist.get_world_size()], 5, prefix)


for _entry in STREAMING:
    CASES[f"layer {_entry.name}"] = functools.partial(mechanism, _entry, 0)
    if _entry.can("prefix"):
        CASES[f"layer {_entry.name} prefix"] = functools.partial(mechanism, _entry, 2)


def conditioned():
    layer = create_attention("inline", 16, 2, dtype=torch.float64)
    same_as_one(random(layer), HEIGHTS[dist.get_world_size()], 5, 1, conditioned=True)


def turned(name):
    """Each rank turns tokens by their places in the whole grid."""
    layer = create_attention(name, 16, 2, rotary=True, dtype=torch.float64)
    same_as_one(random(layer), HEIGHTS[dist.get_world_size()], 5, 1)


def biased_prefix():
    """Parameters that only prefix tokens use have gradients on all ranks, as DDP needs."""
    layer = create_attention("agent", 16, 2, grid=(4, 4), prefix_bias=True, dtype=torch.float64)
    same_as_one(random(layer), HEIGHTS[dist.get_world_size()], 5, 1)


def half_precision():
    layer = random(create_attention("efficient", 16, 2)).bfloat16()
    same_as_one(layer, HEIGHTS[dist.get_world_size()], 5, 1, tolerance=5e-2)


def collectives():
    """One change of bands, one gather a round, and one each for what is agreed on and for prefix tokens."""
    layer = split(create_attention("agent", 16, 2), rows())
    calls = collections.Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_to_all_single"):
            patch.setattr(dist, name, functools.partial(counted, getattr(dist, name), calls, name))
        with torch.no_grad():
            layer(torch.randn(1, 1 + 6, 16), Grid(2, 3, 1))
    assert calls == {"all_gather_into_tensor": len(layer.core.rounds) + 2, "all_to_all_single": 1}


def counted(function, calls, name, *arguments, **more):
    calls[name] += 1
    return function(*arguments, **more)


CASES |= {
    "a conditioned layer": conditioned,
    "turned tokens": functools.partial(turned, "agent"),
    "turned features": functools.partial(turned, "inline"),
    "a bias of prefix tokens": biased_prefix,
    "a layer of bfloat16": half_precision,
    "one gather a round": collectives,
}
