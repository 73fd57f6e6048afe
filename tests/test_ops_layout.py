"""Grids, padded batches and tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linsight.errors import LinsightError
from linsight.ops import Grid, Layout, Tile, as_layout, check_tokens, tiles

GRIDS = st.builds(Grid, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2))
SIDE, HALO = st.integers(1, 10), st.integers(0, 3)


def numbered(grid):
    """A sequence whose tokens hold their own place."""
    return torch.arange(grid.tokens)[None, :, None]


@given(grid=GRIDS, height=SIDE, width=SIDE, halo=HALO)
def test_tiles_cover_the_grid_once(grid, height, width, halo):
    x = numbered(grid)
    cut = tiles(grid, height, width, halo)
    places = torch.cat([tile.inner(tile.take(x)) for tile in cut], dim=1).flatten().tolist()
    assert sorted(places) == list(range(grid.tokens))
    assert [tile.prefix for tile in cut] == [grid.prefix] + [0] * (len(cut) - 1)
    assert all(tile.height <= height and tile.width <= width for tile in cut)


@given(grid=GRIDS, data=st.data(), halo=HALO)
def test_take_sees_the_halo_and_inner_drops_it(grid, data, halo):
    top, left = data.draw(st.integers(0, grid.height - 1)), data.draw(st.integers(0, grid.width - 1))
    height, width = data.draw(st.integers(1, grid.height - top)), data.draw(st.integers(1, grid.width - left))
    tile, x = Tile(grid, top, left, height, width, halo), numbered(grid)

    def places(rows, columns):
        inside = [grid.prefix + y * grid.width + x for y in rows for x in columns]
        return [*range(grid.prefix if (top, left) == (0, 0) else 0), *inside]

    rows = range(max(0, top - halo), min(grid.height, top + height + halo))
    columns = range(max(0, left - halo), min(grid.width, left + width + halo))
    seen = tile.take(x)
    assert seen.flatten().tolist() == places(rows, columns)
    assert tile.seen == (len(rows), len(columns))
    own = places(range(top, top + height), range(left, left + width))
    assert tile.inner(seen).flatten().tolist() == own
    assert tile.inner_grid(seen[:, tile.prefix :]).flatten().tolist() == own[tile.prefix :]


def test_the_whole_is_not_copied():
    grid = Grid(3, 4, 1)
    x, tile = numbered(grid), Tile.whole(grid)
    assert tile.is_whole
    assert tile.inner(tile.take(x)) is x


@given(grid=GRIDS, data=st.data())
def test_keep_is_each_image_at_the_top_left(grid, data):
    size = st.tuples(st.integers(0, grid.height), st.integers(0, grid.width))
    sizes = data.draw(st.lists(size, min_size=1, max_size=3))
    keep = Layout(grid, torch.tensor(sizes)).keep(torch.device("cpu"))
    assert keep.shape == (len(sizes), grid.tokens)
    for row, (height, width) in zip(keep, sizes, strict=True):
        assert row[: grid.prefix].all()
        inside = row[grid.prefix :].unflatten(0, (grid.height, grid.width))
        assert inside[:height, :width].all()
        assert inside.sum() == height * width


def test_the_last_tiles_are_smaller():
    found = tiles(Grid(5, 7), 3, 4)
    assert [(tile.top, tile.left, tile.height, tile.width) for tile in found] == [
        (0, 0, 3, 4),
        (0, 4, 3, 3),
        (3, 0, 2, 4),
        (3, 4, 2, 3),
    ]


def test_packed_images_lie_one_behind_the_other():
    layout = Layout.packed([Grid(2, 3, 1), Grid(4, 1), Grid(1, 5, 2)])
    assert layout.cu_seqlens.tolist() == [0, 7, 11, 18] and layout.cu_seqlens.dtype == torch.int32
    assert layout.grid == (4, 5, 2) and layout.prefix == 2


def test_a_bare_grid_fills_its_canvas():
    assert as_layout(Grid(2, 3)) == Layout(Grid(2, 3))
    assert as_layout(Grid(2, 3)).keep(torch.device("cpu")) is None
    assert Grid(2, 3, 4).tokens == 10


@pytest.mark.parametrize("shape", [(1, 5, 8), (6, 8), (1, 6, 8, 1)])
def test_wrong_token_counts_name_shape_and_grid(shape):
    with pytest.raises(LinsightError) as caught:
        check_tokens(torch.zeros(shape), Layout(Grid(2, 3)), "context")
    message = str(caught.value)
    assert all(part in message for part in ("context", str(shape), "2x3", "6"))
    assert "\n" not in message
