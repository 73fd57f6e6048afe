"""Attention through pooled tokens, against its parts written out."""

import pytest
import torch
from torch.nn import functional as F

from linsight.ops import Grid, Tile, gather_pooled, gather_state, pool_tokens, read_pooled, tiles

F64 = torch.float64


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (7, 7), (2, 5)], ids=str)
@pytest.mark.parametrize("grid", [Grid(7, 13), Grid(1, 4), Grid(6, 5, 2)])
def test_tiles_add_up_to_the_pooled_grid(grid, size):
    """Cells overlap where their number does not divide the side, or repeat where there are more of them."""
    x = torch.randn(2, grid.tokens, 3, 4, dtype=F64)
    canvas = x[:, grid.prefix :].flatten(2).transpose(1, 2).unflatten(2, grid[:2])
    truth = F.adaptive_avg_pool2d(canvas, size).flatten(2).transpose(1, 2).unflatten(2, (3, 4))
    parts = [pool_tokens(tile.take(x), tile, size) for tile in tiles(grid, 3, 4)]
    torch.testing.assert_close(sum(parts), truth)
    torch.testing.assert_close(pool_tokens(x, Tile.whole(grid), size), truth)
    leaf = x.clone().requires_grad_()  # by another way, whose gradient is deterministic everywhere
    pooled = pool_tokens(leaf, Tile.whole(grid), size)
    torch.testing.assert_close(pooled, truth)
    pooled.square().sum().backward()
    assert leaf.grad[:, : grid.prefix].abs().sum() == 0 and leaf.grad[:, grid.prefix :].any()


def test_each_image_is_pooled_over_its_own_size():
    grid, sizes = Grid(5, 6, 1), [(5, 6), (3, 4), (1, 1)]
    x = torch.randn(3, grid.tokens, 2, 2, dtype=F64)
    pooled = pool_tokens(x, Tile.whole(grid, torch.tensor(sizes)), (3, 3))
    for i, (height, width) in enumerate(sizes):
        own = x[i : i + 1, 1:].unflatten(1, (5, 6))[:, :height, :width].flatten(1, 2)
        torch.testing.assert_close(pooled[i : i + 1], pool_tokens(own, Tile.whole(Grid(height, width)), (3, 3)))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gather_and_read_are_softmax_attention(biased, masked):
    batch, pooled_count, keys, queries, heads, width = 2, 4, 9, 5, 3, 6
    pooled = torch.randn(batch, pooled_count, heads, width, dtype=F64)
    k, v = torch.randn(2, batch, keys, heads, width, dtype=F64)
    q = torch.randn(batch, queries, heads, width, dtype=F64)
    bias = torch.randn(1, heads, pooled_count, keys, dtype=F64) if biased else None
    back = torch.randn(1, heads, queries, pooled_count, dtype=F64) if biased else None
    keep = torch.rand(batch, keys) < 0.6 if masked else None
    if keep is not None:
        keep[:, 0] = True
    scores = torch.einsum("bahd,bnhd->bhan", pooled, k) / width**0.5 + (0 if bias is None else bias)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], float("-inf"))
        k, v = (t.masked_fill(~keep[..., None, None], torch.nan) for t in (k, v))
    values = scores.softmax(-1) @ v.nan_to_num().transpose(1, 2)
    torch.testing.assert_close(gather_pooled(pooled, k, v, bias, keep), values)
    clean = k.nan_to_num()
    torch.testing.assert_close(gather_state(pooled, clean, v, bias, keep).mean(), values)
    halves = [
        gather_state(
            pooled,
            clean[:, part],
            v[:, part],
            None if bias is None else bias[..., part],
            None if keep is None else keep[:, part],
        )
        for part in (slice(0, 4), slice(4, None))
    ]
    torch.testing.assert_close(halves[0].merge(halves[1]).mean(), values)
    reading = torch.einsum("bmhd,bahd->bhma", q, pooled) / width**0.5 + (0 if back is None else back)
    out = (reading.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(read_pooled(q, pooled, values, back), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    grid = Grid(8, 8)
    q, k, v = torch.randn(3, 1, 64, 2, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool_tokens(q, Tile.whole(grid), (3, 3))
        values = gather_pooled(pooled, k, v, None)
        out = read_pooled(q, pooled, values, None)
    for found in (pooled, values, out):
        assert found.dtype == torch.float32
    exact_pooled = pool_tokens(q.double(), Tile.whole(grid), (3, 3))
    exact = read_pooled(q.double(), exact_pooled, gather_pooled(exact_pooled, k.double(), v.double(), None), None)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
