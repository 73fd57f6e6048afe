"""Batch norms over all processes: of one, they are torch's."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from linsight.train.norms import _batch_norm


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def normed(function, x, affine):
    """The output, the gradients of what learns, and the running statistics, which begin at 0, where rounding is felt.

    affine: the weight and the bias; nothing for a norm without.
    """
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *affine)]
    mean, variance = torch.zeros(x.shape[1]), torch.zeros(x.shape[1])
    out = function(leaves[0], mean, variance, *(leaves[1:] or (None, None)), True, 0.3, 1e-5)
    factors = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * factors).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves), mean, variance]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1e-3, 1.0])  # the variance is a tenth of eps, or far more
@pytest.mark.parametrize("shape", [(9, 4), (3, 4, 5, 2)], ids=["2-D", "4-D"])
def test_of_one_process_they_are_those_of_torch(alone, shape, spread, dtype):
    generator = torch.Generator().manual_seed(0)
    x = ((torch.randn(shape, generator=generator) + 0.5) * spread).to(dtype)
    for affine in ((torch.randn(4, generator=generator), torch.randn(4, generator=generator)), ()):
        found, expected = (normed(function, x, affine) for function in (_batch_norm, F.batch_norm))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            error = (ours.double() - theirs.double()).abs().max()
            assert error <= (1e-5 if dtype is torch.float32 else 1e-2) * theirs.double().abs().max()


def test_in_evaluation_they_are_those_of_torch_without_a_group():
    x, mean, variance = torch.randn(6, 4, 3), torch.randn(4), torch.rand(4)
    assert torch.equal(_batch_norm(x, mean, variance), F.batch_norm(x, mean, variance))
