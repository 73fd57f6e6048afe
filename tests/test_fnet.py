"""FNet against its definition, the form of exported graphs, its scale, and what a layer without parameters is."""

import math

import pytest
import torch

from linsight import create_attention
from linsight.attention.mechanisms.fnet import by_matrices, fourier, operator
from linsight.ops import Grid
from matrix.subject import close

F64 = torch.float64


def defined(x):
    """The double sum, frequency by frequency."""
    _, tokens, width = x.shape
    n, c = torch.arange(tokens, dtype=F64), torch.arange(width, dtype=F64)
    waves = [torch.exp(-2j * math.pi * (i[:, None] * i / len(i))) for i in (n, c)]
    return torch.einsum("nm,bmc,cd->bnd", waves[0], x.to(torch.complex128), waves[1]).real


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 6), (7, 13)], ids=str)
def test_all_forms_are_the_definition(size):
    x = torch.randn(2, size[0] * size[1], 5, dtype=F64)
    truth = defined(x)
    close(fourier(x, size), truth)
    close(operator(x), truth)
    close(by_matrices(x, size), truth)
    close(by_matrices(x, (1, x.shape[1])), truth)


def test_gradients_of_the_compiled_form():
    x = torch.randn(1, 6, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(operator, x)


def test_prefix_tokens_are_the_first_of_the_sequence():
    layer, x = create_attention("fnet", 8, 2).double(), torch.randn(2, 1 + 6, 8, dtype=F64)
    close(layer(x, Grid(2, 3, 1)), defined(x))


def test_unscaled_unless_asked():
    """As published the deviation grows by sqrt(N C / 2); float16 is transformed in float32."""
    x, grid = torch.randn(2, 4096, 32), Grid(64, 64)
    out = create_attention("fnet", 32, 1)(x, grid)
    assert abs(out.std() / (4096 * 32 / 2) ** 0.5 - 1) < 0.05
    torch.testing.assert_close(create_attention("fnet", 32, 1, ortho=True)(x, grid), out / (4096 * 32) ** 0.5)
    half = create_attention("fnet", 32, 1, dtype=torch.float16)(x.half(), grid)
    close(half.double(), create_attention("fnet", 32, 1)(x.half().double(), grid), 1e-3)


def test_no_parameters():
    assert not list(create_attention("fnet", 16, 2).parameters())
