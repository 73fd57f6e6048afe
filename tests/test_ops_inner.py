"""Inner models: closed forms against autograd of the scalar loss, the step, kernels by tiles; windows of neighbours."""

import pytest
import torch
from torch.nn import functional as F

from linsight.ops import (
    INNER_MODELS,
    Grid,
    InnerGradient,
    Tile,
    inner_forward,
    inner_gradient,
    inner_step,
    kernel_gradient,
    neighbourhood_attention,
    tiles,
)

F64 = torch.float64
# The models as their papers write them; matrices multiply from the right.
NAIVE = {
    "swiglu": lambda u, w: (u @ w[0]) * F.silu(u @ w[1]),
    "swiglu3": lambda u, w: (F.silu(u @ w[0]) * (u @ w[1])) @ w[2],
    "mlp2": lambda u, w: F.silu(u @ w[0]) @ w[1],
}


def heads_first(x):
    return x.transpose(1, 2)


def random_inner(name, batch=2, tokens=7, heads=3, width=4):
    """k, v and matrices, one for each image so that autograd gives one gradient for each."""
    k, v = torch.randn(2, batch, tokens, heads, width, dtype=F64)
    count = INNER_MODELS[name].matrices
    w = [torch.randn(1, heads, width, width, dtype=F64) for _ in range(count)]
    return k, v, w


@pytest.mark.parametrize("loss", ["dot", "mse"])
@pytest.mark.parametrize("name", NAIVE)
def test_gradient_is_that_of_the_scalar_loss(name, loss):
    (k, v, w), model = random_inner(name), INNER_MODELS[name]
    keep = torch.rand(2, 7) < 0.7
    leaves = [x.repeat(2, 1, 1, 1).requires_grad_() for x in w]
    out = heads_first(NAIVE[name](heads_first(k), leaves))
    torch.testing.assert_close(inner_forward(model, k, torch.cat(w, dim=-1)), out.detach())
    each = -(out * v) if loss == "dot" else (out - v).square() / 2
    truth = torch.autograd.grad(each[keep].sum(), leaves)
    hole = ~keep[..., None, None]  # what is not kept may be anything
    k, v = k.masked_fill(hole, torch.nan), v.masked_fill(hole, torch.nan)
    found = inner_gradient(model, loss, k, v, torch.cat(w, dim=-1), keep)
    torch.testing.assert_close(found, torch.cat(truth, dim=-1))


@pytest.mark.parametrize("loss", ["dot", "mse"])
@pytest.mark.parametrize("name", NAIVE)
def test_outer_gradient_goes_through_the_inner_one(name, loss):
    k, v, w = random_inner(name, tokens=3, heads=1, width=2)
    leaves = [x.clone().requires_grad_() for x in (k, v, torch.cat(w, dim=-1))]
    assert torch.autograd.gradcheck(lambda k, v, w: inner_gradient(INNER_MODELS[name], loss, k, v, w), leaves)


@pytest.mark.parametrize("cut", [(6, 5), (2, 3), (1, 1), (6, 1)], ids=str)
def test_kernel_gradient_is_that_of_the_convolution(cut):
    grid, channels = Grid(6, 5), 4
    k, v = torch.randn(2, 2, grid.tokens, channels, dtype=F64)
    kernels = torch.randn(2 * channels, 1, 3, 3, dtype=F64, requires_grad=True)
    canvas = k.transpose(1, 2).reshape(1, -1, 6, 5)
    out = F.conv2d(canvas, kernels, padding=1, groups=2 * channels).reshape(2, channels, -1).transpose(1, 2)
    (truth,) = torch.autograd.grad(-(out * v).sum(), kernels)
    parts = [kernel_gradient(tile.take(k), tile.take(v), tile) for tile in tiles(grid, *cut, halo=1)]
    torch.testing.assert_close(sum(parts), truth.reshape(2, channels, 3, 3))


def test_clip_is_by_column_or_by_kernel():
    """Each column of a matrix, each kernel, by itself: its norm ends below 1 and its direction is kept."""
    total, tokens = 1e3 * torch.randn(2, 3, 4, 8, dtype=F64), torch.tensor([5.0, 50.0], dtype=F64)
    w = torch.randn(1, 3, 4, 8, dtype=F64)
    step = w - inner_step(w, InnerGradient(total, tokens), scale=1 / 3, rate=2.0, clip=(-2,))
    for b in range(2):
        for h in range(3):
            for j in range(8):
                g = total[b, h, :, j] / 3 / tokens[b]
                torch.testing.assert_close(step[b, h, :, j], 2 * g / (g.norm() + 1))
    plain = w - inner_step(w, InnerGradient(total, tokens), scale=1 / 3, rate=2.0)
    torch.testing.assert_close(plain, 2 / 3 * total / tokens[:, None, None, None])
    kernels = torch.randn(2, 4, 3, 3, dtype=F64)
    step = -inner_step(torch.zeros(1, 4, 3, 3), InnerGradient(kernels, tokens), scale=1.0, rate=1.0, clip=(-2, -1))
    g = kernels / tokens[:, None, None, None]
    torch.testing.assert_close(step, g / (1 + g.flatten(2).norm(dim=-1)[..., None, None]))


def naive_neighbours(q, k, v, height, width, window):
    """One query at a time: its window, moved into the image, cut where the image is smaller."""
    out = torch.empty_like(q)
    for y in range(height):
        for x in range(width):
            top, left = (max(0, min(p - window // 2, n - window)) for p, n in ((y, height), (x, width)))
            seen = [
                i * width + j
                for i in range(top, min(top + window, height))
                for j in range(left, min(left + window, width))
            ]
            scores = torch.einsum("bhd,bnhd->bhn", q[:, y * width + x], k[:, seen]) * q.shape[-1] ** -0.5
            out[:, y * width + x] = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), v[:, seen])
    return out


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("grid", [Grid(7, 9), Grid(5, 5), Grid(3, 8), Grid(2, 2), Grid(1, 6)], ids=str)
def test_windows_of_neighbours(grid, window):
    q, k, v = torch.randn(3, 2, grid.tokens, 2, 4, dtype=F64)
    truth = naive_neighbours(q, k, v, *grid[:2], window)
    torch.testing.assert_close(neighbourhood_attention(q, k, v, Tile.whole(grid), window), truth)
    for tile in tiles(grid, 2, 3, halo=window - 1):
        part = neighbourhood_attention(*(tile.take(x) for x in (q, k, v)), tile, window)
        own = Tile(grid, tile.top, tile.left, tile.height, tile.width).take(truth)
        torch.testing.assert_close(part, own)
