"""Small resampling matrices against torch's own resampling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from linsight.ops import Grid, Tile, fit_square, pool_matrix, resize_matrix, separable, table_for, tiles

F64 = torch.float64
SIDE = st.integers(1, 13)
MODE = st.sampled_from(["bilinear", "bicubic"])


def interpolated(table, size, new, mode):
    """The published way: as a map, by torch."""
    canvas = table.unflatten(1, size).permute(0, 3, 1, 2)
    return F.interpolate(canvas, new, mode=mode, align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)


def random_table(size, dtype=F64):
    return torch.randn(1, size[0] * size[1], 3, dtype=dtype)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "bilinear-antialias", "bicubic-antialias"])
def test_resize_matrix(mode):
    """Every length of 1 to 13 to every other."""
    kind, _, antialias = mode.partition("-")
    for old in range(1, 14):
        for new in range(1, 14):
            row = torch.eye(old, dtype=F64)[:, None, None, :]  # (old, 1, 1, old): the matrix, column by column
            truth = F.interpolate(row, (1, new), mode=kind, align_corners=False, antialias=bool(antialias))[:, 0, 0].T
            torch.testing.assert_close(resize_matrix(old, new, mode, dtype=F64), truth, rtol=0, atol=1e-12)
            torch.testing.assert_close(resize_matrix(old, new, mode), truth.float(), rtol=0, atol=1e-5)


@given(old=SIDE, new=SIDE, start=st.integers(0, 12), count=SIDE, mode=MODE)
def test_resize_matrix_in_part(old, new, start, count, mode):
    whole = resize_matrix(old, new, mode, dtype=F64)
    start = min(start, new - 1)
    count = min(count, new - start)
    torch.testing.assert_close(
        resize_matrix(old, new, mode, start=start, count=count, dtype=F64), whole[start:][:count]
    )
    torch.testing.assert_close(resize_matrix(old, new, mode, start=start, dtype=F64), whole[start:])


@given(old=SIDE, lengths=st.lists(SIDE, min_size=1, max_size=4), mode=MODE)
def test_resize_matrix_of_each_image(old, lengths, mode):
    out = resize_matrix(old, torch.tensor(lengths), mode, count=13, dtype=F64)
    assert out.shape == (len(lengths), 13, old) and out.isfinite().all()
    for matrix, new in zip(out, lengths, strict=True):
        torch.testing.assert_close(matrix[:new], resize_matrix(old, new, mode, dtype=F64))


@given(height=SIDE, width=SIDE, new=SIDE)
def test_pool_matrix(height, width, new):
    canvas = torch.randn(2, 3, height, width, dtype=F64)
    rows, columns = (pool_matrix(side, new, dtype=F64) for side in (height, width))
    out = separable(canvas.permute(0, 2, 3, 1), rows, columns)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), F.adaptive_avg_pool2d(canvas, new))


@given(old=SIDE, new=SIDE, start=st.integers(0, 12), count=SIDE)
def test_pool_matrix_of_a_tile_is_a_slice(old, new, start, count):
    start, whole = min(start, old - 1), pool_matrix(old, new, dtype=F64)
    count = min(count, old - start)
    part = pool_matrix(old, new, start=start, count=count, dtype=F64)
    assert torch.equal(part, whole[:, start : start + count])


def test_pool_matrix_of_a_padded_batch():
    """Each image is pooled over its own length; what pads it weighs nothing."""
    lengths = (7, 4, 1)
    matrices = pool_matrix(torch.tensor(lengths), 3, count=7, dtype=F64)
    for matrix, length in zip(matrices, lengths, strict=True):
        torch.testing.assert_close(matrix[:, :length], pool_matrix(length, 3, dtype=F64))
        assert not matrix[:, length:].any()


@given(old=st.tuples(SIDE, SIDE), new=st.tuples(SIDE, SIDE), mode=MODE)
def test_table_for_a_whole_grid(old, new, mode):
    table = random_table(old)
    out = table_for(table, old, Tile.whole(Grid(*new, 2)), mode)
    torch.testing.assert_close(out, interpolated(table, old, new, mode), rtol=0, atol=1e-12)


@given(old=st.tuples(SIDE, SIDE), new=st.tuples(SIDE, SIDE), native=st.booleans(), cut=st.tuples(SIDE, SIDE), mode=MODE)
def test_table_for_tiles_is_the_whole(old, new, native, cut, mode):
    grid, table = Grid(*(old if native else new)), random_table(old)
    whole = table_for(table, old, Tile.whole(grid), mode)
    for tile in tiles(grid, *cut, halo=2):
        torch.testing.assert_close(table_for(table, old, tile, mode), tile.take_grid(whole))


@given(mode=MODE, halo=st.integers(0, 2))
def test_table_for_a_padded_batch(mode, halo):
    """Each image has the table stretched over its own size; the canvas beyond it is finite."""
    old, canvas, sizes = (4, 6), Grid(7, 5), [(7, 5), (4, 5), (1, 1), (3, 2)]
    table = random_table(old)
    alone = [interpolated(table, old, size, mode).unflatten(1, size)[0] for size in sizes]
    for tile in (Tile.whole(canvas, torch.tensor(sizes)), Tile(canvas, 2, 1, 3, 2, halo, torch.tensor(sizes))):
        out = table_for(table, old, tile, mode)
        assert out.shape == (4, tile.seen[0] * tile.seen[1], 3) and out.isfinite().all()
        (top, bottom), (left, right) = tile.rows, tile.columns
        for i, image in enumerate(alone):
            wanted = image[top:bottom, left:right]
            torch.testing.assert_close(out[i].unflatten(0, tile.seen)[: len(wanted), : wanted.shape[1]], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_table_for_a_half_table_is_made_in_float32(dtype):
    table = random_table((4, 6), dtype)
    out = table_for(table, (4, 6), Tile.whole(Grid(5, 7)), "bicubic")
    assert out.dtype == torch.float32
    truth = interpolated(table.double(), (4, 6), (5, 7), "bicubic")
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5)


def test_table_for_a_compiled_grid_of_its_own_size():
    """A compiled graph is for all sizes, so it resamples at the table's own size too: to the same values."""
    table = random_table((4, 6), torch.float32)

    def run(table):
        return table_for(table, (4, 6), Tile.whole(Grid(4, 6)), "bicubic")

    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(table), table, rtol=0, atol=0)


def test_fit_square():
    table = torch.randn(1, 49, 3, dtype=torch.float16)
    fitted = fit_square(table, (5, 9), "bicubic")
    assert (fitted.old, fitted.new, fitted.tensor.dtype) == ((7, 7), (5, 9), torch.float16)
    truth = interpolated(table.float(), (7, 7), (5, 9), "bicubic")
    torch.testing.assert_close(fitted.tensor.float(), truth, rtol=1e-3, atol=1e-3)
    for no_square in (torch.randn(1, 48, 3), torch.randn(1, 0, 3), torch.randn(49, 3), torch.randn(2, 49, 3)):
        assert fit_square(no_square, (5, 9), "bicubic") is None
