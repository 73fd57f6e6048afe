"""Batch norms over all processes: of one, they are torch's."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from linsight.train.norms import synchronised


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def norm(axes, affine):
    """A norm of four channels, whose running statistics begin at 0, where rounding is felt."""
    found = (nn.BatchNorm1d if axes == 2 else nn.BatchNorm2d)(4, momentum=0.3, affine=affine)
    for value in (found.running_var, *found.parameters()):
        torch.nn.init.normal_(value) if value.requires_grad else value.zero_()
    return found


def normed(module, x):
    """The output, the gradients of what learns, and the running statistics."""
    x = x.clone().requires_grad_()
    out = module(x)
    factors = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * factors).sum().backward()
    return [out.detach(), x.grad, *(leaf.grad for leaf in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0])  # the variance is a tenth of eps, or far more
@pytest.mark.parametrize("shape", [(9, 4), (3, 4, 5, 2)], ids=["2-D", "4-D"])
@pytest.mark.parametrize("affine", [True, False])
def test_of_one_process_they_are_those_of_torch(alone, affine, shape, spread, dtype):
    x = ((torch.randn(shape) + 0.5) * spread).to(dtype)
    plain = norm(len(shape), affine)
    ours = synchronised(copy.deepcopy(plain))
    for found, expected in zip(normed(ours, x), normed(plain, x), strict=True):
        assert found.dtype == expected.dtype
        error = (found.double() - expected.double()).abs().max()
        assert error <= (1e-5 if dtype is torch.float32 else 1e-2) * expected.double().abs().max()


def test_in_evaluation_they_are_torch_s_own_and_ask_no_other_process():
    plain, x = norm(4, True).eval(), torch.randn(3, 4, 5, 2)
    assert torch.equal(synchronised(copy.deepcopy(plain))(x), plain(x))
