"""Cases of layers and blocks: what each rank finds is its share of what one process does."""

import copy
import functools
import itertools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from linsight import Grid, create_attention
from linsight.attention import list_attentions
from linsight.parallel import split

STREAMING = [entry for entry in list_attentions(stream=True) if entry.kind == "core"]
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


def same_as_one(layer, heights, width, prefix, dim=16, **more):
    """Outputs, and the gradients of the sum of the ranks' losses, are those of one process with all rows."""
    height, dtype = sum(heights), next(layer.parameters()).dtype
    grid = Grid(height, width, prefix)
    x, weight = (torch.randn(2, grid.tokens, dim, dtype=dtype) for _ in range(2))
    first, end = own(heights)
    mine = torch.cat([torch.arange(prefix), torch.arange(prefix + first * width, prefix + end * width)])
    dense = copy.deepcopy(layer)
    whole = x.clone().requires_grad_()
    expected = dense(whole, grid, **more)
    (expected * weight).sum().backward()

    counted = weight[:, mine].clone()
    if dist.get_rank():
        counted[:, :prefix] = 0  # once, in the loss of the first rank
    band = x[:, mine].clone().requires_grad_()
    found = split(layer, rows())(band, Grid(end - first, width, prefix))
    close(found, expected[:, mine])
    (found * counted).sum().backward()
    close(band.grad[:, prefix:], whole.grad[:, mine][:, prefix:])
    close(summed(band.grad[:, :prefix]), whole.grad[:, :prefix]) if prefix else None
    for (name, parameter), other in zip(layer.named_parameters(), dense.parameters(), strict=True):
        if other.grad is not None:
            assert parameter.grad is not None, name
            close(summed(parameter.grad), other.grad)


def mechanism(entry, prefix):
    layer = create_attention(entry.name, 16, 2, grid=(4, 4), dtype=torch.float64)
    same_as_one(random(layer), HEIGHTS[dist.get_world_size()], 5, prefix)


for _entry in STREAMING:
    CASES[f"layer {_entry.name}"] = functools.partial(mechanism, _entry, 0)
    if _entry.capabilities.prefix:
        CASES[f"layer {_entry.name} prefix"] = functools.partial(mechanism, _entry, 2)
